// Runs the pure parts of edge_agent.hpp on records of stdin, and prints one line for each.
//
// A record: one letter, now_ns (int64), suspended_ns (int64), size of the bytes (uint32), the bytes. The letter:
//   j  the bytes as JSON                    m  the bytes as a message of the stream actions, as JSON
//   n  a new Follower                       r  Follower::read     d  Follower::discard_before
//   a  Follower::at: what to do, and why    w  a request with the bytes as its text, in hexadecimal
//
// With a folder as its argument: an Agent. Lines of stdin are pause, resume or an instruction; it prints every change.
#include "edge_agent.hpp"

#include <cstdio>
#include <iostream>
#include <optional>

using edge_agent::Reader;

namespace {

std::string text_as_json(std::string_view text) {
    std::string out = "\"";
    char escaped[8];
    for (const char c : text) {
        const bool is_plain = static_cast<unsigned char>(c) >= 0x20 && c != '"' && c != '\\';
        std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned char>(c));
        out += is_plain ? std::string(1, c) : escaped;
    }
    return out + '"';
}

std::string number_as_json(double number) {
    if (std::isnan(number)) return "NaN";
    if (std::isinf(number)) return number > 0 ? "Infinity" : "-Infinity";
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", number);
    return std::string(text) + (std::string_view(text).find_first_of(".e") == std::string_view::npos ? ".0" : "");
}

std::string bytes_as_hex(std::string_view bytes) {
    std::string out;
    char digits[4];
    for (const char c : bytes) {
        std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(c));
        out += digits;
    }
    return out;
}

bool append_json(Reader& reader, std::string& out, int depth = 0) {
    Reader::Token token;
    if (depth > 100 || !reader.next(token)) return false;
    const bool is_map = token.kind == Reader::map;
    switch (token.kind) {
        case Reader::nil: out += "null"; return true;
        case Reader::boolean: out += token.number ? "true" : "false"; return true;
        case Reader::integer: out += std::to_string(token.number); return true;
        case Reader::real: out += number_as_json(token.real); return true;
        case Reader::text: out += text_as_json(token.string); return true;
        case Reader::bytes: out += '"' + bytes_as_hex(token.string) + '"'; return true;
        case Reader::other: return false;
        default: break;
    }
    out += is_map ? '{' : '[';
    for (std::uint64_t i = 0; i < token.count; ++i) {
        if (i > 0) out += is_map && i % 2 ? ':' : ',';
        if (!append_json(reader, out, depth + 1)) return false;
    }
    out += is_map ? '}' : ']';
    return true;
}

std::string as_json(const edge_agent::Value& value) {
    const auto* number = std::get_if<double>(&value);
    return number ? number_as_json(*number) : text_as_json(std::get<std::string>(value));
}

template <class T> std::string as_json(const std::map<std::string, T>& values) {
    std::string out;
    for (const auto& [name, value] : values) out += (out.empty() ? "" : ",") + text_as_json(name) + ":" + as_json(value);
    return "{" + out + "}";
}

std::string message_as_json(std::string_view message) {
    edge_agent::Action a;
    if (!edge_agent::read_message(message, a)) return "discard";
    std::string out = "{\"kind\":" + text_as_json(a.kind) + ",\"v\":" + std::to_string(a.v);
    const auto add = [&](const char* name, const std::string& json) { out += std::string(",\"") + name + "\":" + json; };
    for (const auto& [name, number] : std::initializer_list<std::pair<const char*, std::int64_t>>{
             {"session", a.session}, {"seq", a.seq}, {"t_pub_ns", a.t_pub_ns}, {"frame_id", a.frame_id},
             {"t_capture_ns", a.t_capture_ns}, {"dropped_frames", a.dropped_frames}})
        add(name, std::to_string(number));
    for (const auto& [name, text] : std::initializer_list<std::pair<const char*, std::string>>{
             {"bundle_id", a.bundle_id}, {"camera", a.camera}, {"capture_clock", a.capture_clock},
             {"instruction", a.instruction}})
        add(name, text_as_json(text));
    add("age_ms", number_as_json(a.age_ms));
    if (a.kind == "refusal") {
        add("reason", text_as_json(a.reason));
        add("detail", text_as_json(a.detail));
        return out + "}";
    }
    add("stages_ms", as_json(edge_agent::Values{{"queue", a.queue_ms}, {"encode", a.encode_ms}, {"prefill", a.prefill_ms},
                                                {"decode", a.decode_ms}, {"check", a.check_ms}}));
    add("valid_for_ms", std::to_string(a.valid_for_ms));
    add("valid_until_ns", std::to_string(a.valid_until_ns));
    add("action_space", text_as_json(a.action_space));
    add("type", text_as_json(a.type));
    add("values", as_json(a.values));
    add("clamped", as_json(edge_agent::Values(a.clamped.begin(), a.clamped.end())));
    add("adapter", text_as_json(a.adapter));
    std::string chunk;
    for (const auto& values : a.chunk) chunk += (chunk.empty() ? "" : ",") + as_json(values);
    add("chunk", "[" + chunk + "]");
    add("chunk_step_ms", std::to_string(a.chunk_step_ms));
    return out + "}";
}

std::string at(edge_agent::Follower& follower, std::int64_t now_ns, std::int64_t suspended_ns) {
    bool is_change = false;
    const edge_agent::Action* action = follower.at(now_ns, suspended_ns, is_change);
    const std::string counts = " lost=" + std::to_string(follower.lost) + " discarded=" + std::to_string(follower.discarded);
    const std::string what = action ? action->type + " " + std::to_string(action->seq) : "hold: " + follower.reason;
    return (is_change ? "change " : "same ") + what + (follower.is_new_session ? " new" : "") + counts;
}

int run_agent(const char* folder) {
    edge_agent::Agent agent(folder);
    std::string last;
    for (std::string line;;) {
        zmq_pollitem_t input{nullptr, 0, ZMQ_POLLIN, 0};
        if (zmq_poll(&input, 1, 0) > 0) {
            if (!std::getline(std::cin, line)) return 0;
            if (line == "pause") agent.pause();
            else if (line == "resume") agent.resume();
            else agent.instruct(line);
        }
        const edge_agent::Action* action = agent.next(10);
        const std::string now = action ? action->type : "hold: " + agent.reason();
        if (now != last) std::cout << now << std::endl;
        last = now;
    }
}

template <class T> bool take(T& value) { return std::fread(&value, sizeof value, 1, stdin) == 1; }

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2) return run_agent(argv[1]);
    std::optional<edge_agent::Follower> follower;
    char letter = 0;
    std::int64_t now_ns = 0, suspended_ns = 0;
    std::uint32_t size = 0;
    while (take(letter) && take(now_ns) && take(suspended_ns) && take(size)) {
        const std::unique_ptr<char[]> bytes(new char[size]);  // exactly as many, so that a sanitizer sees each byte beyond
        if (size > 0 && std::fread(bytes.get(), size, 1, stdin) != 1) return 1;
        const std::string_view message(bytes.get(), size);
        std::string line;
        if (letter == 'j') {
            Reader reader(message);
            if (!append_json(reader, line) || !reader.is_at_end()) line = "discard";
        }
        if (letter == 'm') line = message_as_json(message);
        if (letter == 'n') follower.emplace(suspended_ns);
        if (letter == 'r') follower->read(message, now_ns);
        if (letter == 'd') follower->discard_before(now_ns, "told to");
        if (letter == 'a') line = at(*follower, now_ns, suspended_ns);
        if (letter == 'w') {
            edge_agent::Writer request(5);
            request.add("v", 1).add("id", "7").add("op", "instruct").add("text", message).add("expires_ns", now_ns);
            line = bytes_as_hex(request.bytes);
        }
        std::printf("%s\n", line.c_str());
    }
}
