// The controller's side of the edge-agent protocol, version 1 (PROTOCOL.md). C++17, Linux, libzmq. One thread.
//
//     edge_agent::Agent agent("/run/edge-agent");
//     const edge_agent::Action* action = agent.next(50);  // follow it now; nullptr: hold, agent.reason() says why
//
// read_message and Follower are pure: they take bytes and times. Agent has the sockets and the clocks.
#pragma once

#include "bounded_msgpack.hpp"

#include <cerrno>
#include <deque>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <utility>
#include <zmq.h>

namespace edge_agent {

using ns_t = std::int64_t;
constexpr ns_t ns_per_ms = 1'000'000;
constexpr std::size_t max_message_bytes = 65536;

struct Action {
    std::int64_t v = 0, session = 0, seq = 0, frame_id = 0, valid_for_ms = 0, dropped_frames = 0, chunk_step_ms = 0;
    ns_t t_pub_ns = 0, t_capture_ns = 0, valid_until_ns = 0;
    double age_ms = 0, queue_ms = 0, encode_ms = 0, prefill_ms = 0, decode_ms = 0, check_ms = 0;
    std::string kind, bundle_id, camera, capture_clock, action_space, type, instruction, adapter;
    std::string reason, detail;  // of a refusal
    Values values;
    std::vector<Values> chunk;
    std::map<std::string, double> clamped;

    double number(const std::string& name) const {  // of values; NaN: there is none
        const auto found = values.find(name);
        const double* number = found == values.end() ? nullptr : std::get_if<double>(&found->second);
        return number ? *number : std::nan("");
    }
};

// One message of the stream actions. False: discard it (rule 10).
inline bool read_message(std::string_view message, Action& a) {
    const auto is_one_of = [](const std::string& word, std::initializer_list<const char*> words) {
        return std::find(words.begin(), words.end(), word) != words.end();
    };
    if (message.size() > max_message_bytes || message.substr(0, 1) != "A") return false;
    message.remove_prefix(1);
    Reader::Fields head{field("v", a.v), field("kind", a.kind)};
    if (!Reader(message).read(head) || a.v != 1 || !is_one_of(a.kind, {"action", "refusal"})) return false;

    Reader::Fields stages{field("queue", a.queue_ms), field("encode", a.encode_ms), field("prefill", a.prefill_ms),
                          field("decode", a.decode_ms), field("check", a.check_ms)};
    Reader::Fields fields{field("session", a.session), field("seq", a.seq), field("t_pub_ns", a.t_pub_ns),
                          field("bundle_id", a.bundle_id), field("camera", a.camera), field("frame_id", a.frame_id),
                          field("t_capture_ns", a.t_capture_ns), field("capture_clock", a.capture_clock),
                          field("age_ms", a.age_ms), field("instruction", a.instruction),
                          field("dropped_frames", a.dropped_frames)};
    const Reader::Fields of_action{field("stages_ms", stages), field("valid_for_ms", a.valid_for_ms),
                                   field("valid_until_ns", a.valid_until_ns), field("action_space", a.action_space),
                                   field("type", a.type), field("values", a.values), field("clamped", a.clamped),
                                   field("adapter", a.adapter, false), field("chunk", a.chunk, false),
                                   field("chunk_step_ms", a.chunk_step_ms, false)};
    const Reader::Fields of_refusal{field("reason", a.reason), field("detail", a.detail)};
    const bool is_action = a.kind == "action";
    fields.insert(fields.end(), (is_action ? of_action : of_refusal).begin(), (is_action ? of_action : of_refusal).end());
    Reader reader(message);
    return reader.read(fields) && reader.is_at_end() && is_one_of(a.capture_clock, {"driver", "arrival", "sender"}) &&
           (is_action || is_one_of(a.reason, {"late", "invalid", "truncated", "not-finite", "no-state", "paused",
                                              "stale-instruction", "future-timestamp"}));
}

// What to follow at which time (rules 1 to 4 and 6 to 9).
class Follower {
  public:
    explicit Follower(ns_t suspended_ns) : suspended_ns_(suspended_ns) {}  // CLOCK_BOOTTIME - CLOCK_MONOTONIC

    std::string reason = "no action yet";  // of the last hold
    bool is_new_session = false;           // set by the first message of a session
    std::int64_t lost = 0, discarded = 0;  // messages

    ns_t valid_until_ns() const { return stands_ ? action_.valid_until_ns : INT64_MAX; }

    void read(std::string_view message, ns_t now_ns) {
        Action a;
        ++discarded;
        if (!read_message(message, a) || a.seq < 0) return;
        const bool is_action = a.kind == "action", is_other_session = is_known_ && a.session != session_;
        if (std::find(ended_sessions_.begin(), ended_sessions_.end(), a.session) != ended_sessions_.end()) return;
        if (is_known_ && !is_other_session && a.seq <= seq_) return;
        if (!is_action) end("refusal: " + a.reason);
        if (a.t_pub_ns > now_ns + 5 * ns_per_ms) return;
        if (is_action && (a.t_capture_ns > a.t_pub_ns || a.valid_until_ns > a.t_pub_ns + 1000 * ns_per_ms)) return;
        --discarded;
        if (is_other_session) {
            end("new session");
            ended_sessions_.push_back(session_);
            if (ended_sessions_.size() > 1000) ended_sessions_.pop_front();
        } else if (is_known_) {
            lost += a.seq - seq_ - 1;
        }
        is_new_session |= is_other_session || !is_known_;
        is_known_ = true;
        session_ = a.session;
        seq_ = a.seq;
        if (!is_action || a.t_pub_ns < discard_before_ns_) return;
        if (now_ns >= valid_until_ns()) end("expired");
        action_ = std::move(a);
        stands_ = is_unread_ = true;
    }
    void discard_before(ns_t now_ns, const std::string& why) {
        discard_before_ns_ = now_ns;
        if (stands_) end(why);
    }
    // The action to follow, or nullptr. After the end of an action it is nullptr once, also if a newer action is there.
    const Action* at(ns_t now_ns, ns_t suspended_ns, bool& is_change) {
        const bool was_suspended = suspended_ns > suspended_ns_ + 10 * ns_per_ms;
        if (was_suspended) discard_before(now_ns, "the machine was suspended");
        suspended_ns_ = was_suspended ? suspended_ns : std::min(suspended_ns, suspended_ns_);
        if (now_ns >= valid_until_ns()) end("expired");
        is_change = has_ended_ || is_unread_;
        if (std::exchange(has_ended_, false)) return nullptr;
        is_unread_ = false;
        return stands_ ? &action_ : nullptr;
    }

  private:
    void end(const std::string& why) {
        reason = why;
        has_ended_ = true;
        stands_ = is_unread_ = false;
    }

    Action action_;
    bool is_known_ = false, stands_ = false, is_unread_ = false, has_ended_ = true;
    std::int64_t session_ = 0, seq_ = 0;
    std::deque<std::int64_t> ended_sessions_;
    ns_t discard_before_ns_ = 0, suspended_ns_;
};

inline ns_t clock_ns(clockid_t clock) {
    timespec time{};
    clock_gettime(clock, &time);
    return ns_t{time.tv_sec} * 1000 * ns_per_ms + time.tv_nsec;
}

// CLOCK_BOOTTIME - CLOCK_MONOTONIC. An interruption between the two clocks looks like a suspend: read them again.
inline ns_t suspended_ns() {
    ns_t suspended = 0;
    for (int i = 0; i < 5; ++i) {
        const ns_t before_ns = clock_ns(CLOCK_MONOTONIC);
        suspended = clock_ns(CLOCK_BOOTTIME) - before_ns;
        if (clock_ns(CLOCK_MONOTONIC) - before_ns <= ns_per_ms) break;
    }
    return suspended;
}

// Why this user cannot use the folder, or somebody else could pose as the daemon in it; "": all is well.
inline std::string why_unusable(const std::filesystem::path& folder) {
    struct stat own {}, link {}, parent {};
    const auto path = std::filesystem::absolute(folder / ".").lexically_normal().parent_path();
    if (lstat(path.c_str(), &link) != 0 || stat(path.c_str(), &own) != 0 || access(path.c_str(), X_OK) != 0 ||
        stat(path.parent_path().c_str(), &parent) != 0)
        return std::strerror(errno);
    const auto is_of_another = [](const struct stat& s) { return s.st_uid != 0 && s.st_uid != geteuid(); };
    if (own.st_mode & S_IWOTH) return "everybody may write to it";
    return (parent.st_mode & S_IWOTH) && (is_of_another(own) || is_of_another(link)) ? "it is of another user" : "";
}

class Agent {
  public:
    explicit Agent(const std::string& folder) : folder_(folder) {
        const std::string why = why_unusable(folder), not_yet = std::strerror(ENOENT);
        if (!why.empty() && why != not_yet) throw std::runtime_error(folder + ": " + why);
        if (!why.empty()) follower_.reason = folder + ": " + why;
        actions_ = open(ZMQ_SUB, folder + "/actions");
        control_ = open(ZMQ_DEALER, folder + "/control");
    }

    // What shall be. next() asks for it until the daemon says that it is so, and again after a start of the daemon.
    // Nothing is followed before.
    void instruct(const std::string& text) { instruct_ = {"instruct", text, true}; }
    void pause() { pause_ = {"pause", "", true}; }
    void resume() { pause_ = {"resume", "", true}; }

    // The action to follow, or nullptr: hold. Returns at each change, after wait_ms, and after a signal.
    const Action* next(int wait_ms) {
        for (ns_t end_ns = clock_ns(CLOCK_MONOTONIC) + wait_ms * ns_per_ms;;) {
            read_replies();
            std::string message;
            for (int i = 0; i < 1000 && receive(actions_, message); ++i)  // no publisher may keep us from the expiry
                follower_.read(message, clock_ns(CLOCK_MONOTONIC));
            ask();
            bool is_change = false;
            checked_ns_ = clock_ns(CLOCK_MONOTONIC);
            const Action* action = follower_.at(checked_ns_, suspended_ns(), is_change);
            if (is_change || checked_ns_ >= end_ns) return action;
            const ns_t wait_ns = std::min({end_ns, follower_.valid_until_ns(), checked_ns_ + 100 * ns_per_ms}) - checked_ns_;
            zmq_pollitem_t items[] = {{actions_.get(), 0, ZMQ_POLLIN, 0}, {control_.get(), 0, ZMQ_POLLIN, 0}};
            if (zmq_poll(items, 2, static_cast<long>(wait_ns / ns_per_ms + 1)) < 0) end_ns = 0;  // a signal
        }
    }
    ns_t checked_ns() const { return checked_ns_; }  // CLOCK_MONOTONIC just before the action was checked
    const std::string& reason() const { return follower_.reason; }
    std::int64_t lost() const { return follower_.lost; }
    std::int64_t discarded() const { return follower_.discarded; }

  private:
    struct Wish {
        std::string op, text;
        bool is_open = false;
        ns_t ask_ns = 0;                    // when to ask again
        std::string id = {}, refusal = {};  // of the last request
    };
    using Socket = std::unique_ptr<void, int (*)(void*)>;

    Socket open(int type, const std::string& path) {
        const int no = 0, yes = 1, n_messages = 8;
        const std::int64_t max_bytes = 1 << 20;  // more than a message may have: libzmq does not connect again after more
        Socket socket(zmq_socket(context_.get(), type), zmq_close);
        zmq_setsockopt(socket.get(), ZMQ_LINGER, &no, sizeof no);
        zmq_setsockopt(socket.get(), ZMQ_RCVHWM, &n_messages, sizeof n_messages);
        zmq_setsockopt(socket.get(), ZMQ_MAXMSGSIZE, &max_bytes, sizeof max_bytes);
        if (type == ZMQ_SUB) zmq_setsockopt(socket.get(), ZMQ_SUBSCRIBE, "A", 1);
        if (type == ZMQ_DEALER) zmq_setsockopt(socket.get(), ZMQ_IMMEDIATE, &yes, sizeof yes);
        if (zmq_connect(socket.get(), ("ipc://" + path).c_str()) != 0)
            throw std::runtime_error(path + ": " + zmq_strerror(zmq_errno()));
        return socket;
    }
    // The next message, without waiting. What must be discarded becomes an empty one: several parts, or a folder that
    // somebody else has made since the connection.
    bool receive(const Socket& socket, std::string& message) {
        zmq_msg_t part;
        int n_parts = 0, is_more = 1;
        message.clear();
        for (zmq_msg_init(&part); is_more && zmq_msg_recv(&part, socket.get(), ZMQ_DONTWAIT) >= 0; ++n_parts) {
            is_more = zmq_msg_more(&part);
            message.assign(static_cast<const char*>(zmq_msg_data(&part)), zmq_msg_size(&part));
        }
        zmq_msg_close(&part);
        const std::string why = n_parts == 1 ? why_unusable(folder_) : "";
        if (n_parts > 1 || !why.empty()) message.clear();
        if (!why.empty()) follower_.reason = folder_ + ": " + why;
        return n_parts > 0;
    }
    void read_replies() {
        for (std::string message; receive(control_, message);) {
            std::int64_t v = 0;
            std::string id, error;
            bool is_ok = false;
            Reader::Fields result;
            Reader::Fields reply{field("v", v), field("id", id), field("ok", is_ok), field("error", error, false),
                                 field("result", result, false)};
            Reader reader(message);
            if (message.size() > max_message_bytes || !reader.read(reply) || !reader.is_at_end() || v != 1) continue;
            const ns_t now_ns = clock_ns(CLOCK_MONOTONIC);
            for (Wish* wish : {&instruct_, &pause_})
                if (wish->is_open && !wish->id.empty() && wish->id == id) {
                    follower_.discard_before(now_ns, "reply to " + wish->op);
                    *wish = {wish->op, wish->text, !is_ok, now_ns + 1000 * ns_per_ms, "", error};
                }
        }
    }
    void ask() {
        const ns_t now_ns = clock_ns(CLOCK_MONOTONIC);
        const bool is_new_session = std::exchange(follower_.is_new_session, false);
        for (Wish* wish : {&instruct_, &pause_}) {
            if (is_new_session && (wish->op == "instruct" || wish->op == "pause")) *wish = {wish->op, wish->text, true};
            if (wish->is_open && now_ns >= wish->ask_ns) {
                wish->id = std::to_string(++n_requests_);
                wish->ask_ns = now_ns + 10'000 * ns_per_ms;
                Writer request(5);
                request.add("v", 1).add("id", wish->id).add("op", wish->op).add("text", wish->text);
                request.add("expires_ns", wish->ask_ns);
                if (zmq_send(control_.get(), request.bytes.data(), request.bytes.size(), ZMQ_DONTWAIT) < 0)
                    wish->ask_ns = now_ns + 100 * ns_per_ms;  // nobody is there
            }
            if (!wish->is_open && wish->op != "pause") continue;
            follower_.discard_before(now_ns, wish->op);
            follower_.reason = wish->op + (!wish->is_open ? "" : wish->refusal.empty() ? ": no reply yet" : ": " + wish->refusal);
        }
    }

    std::string folder_;
    std::unique_ptr<void, int (*)(void*)> context_{zmq_ctx_new(), zmq_ctx_term};
    Socket actions_{nullptr, zmq_close}, control_{nullptr, zmq_close};
    Follower follower_{suspended_ns()};
    Wish instruct_, pause_;
    std::int64_t n_requests_ = 0;
    ns_t checked_ns_ = 0;
};

}  // namespace edge_agent
