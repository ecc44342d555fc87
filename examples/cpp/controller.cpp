// Follows the velocities of edge-agent. It prints one line for each command: send it to your autopilot instead.
//
//     controller FOLDER [INSTRUCTION]     FOLDER: with the sockets, for example /run/edge-agent
#include "edge_agent.hpp"

#include <csignal>
#include <cstdio>

namespace {

constexpr double max_age_ms = 1000;  // of the image: at 1 m/s, the vehicle has moved 1 m since
volatile std::sig_atomic_t is_ending = 0;

bool can_follow(const edge_agent::Action& a) {  // a number that is missing is NaN
    return a.type == "move" && a.age_ms <= max_age_ms && std::isfinite(a.number("forward_m_s") + a.number("right_m_s") +
                                                                       a.number("down_m_s") + a.number("yaw_rate_rad_s"));
}

void move(edge_agent::ns_t checked_ns, const edge_agent::Action& a) {
    std::printf("@%lld move forward_m_s=%.9g right_m_s=%.9g down_m_s=%.9g yaw_rate_rad_s=%.9g\n",
                static_cast<long long>(checked_ns), a.number("forward_m_s"), a.number("right_m_s"), a.number("down_m_s"),
                a.number("yaw_rate_rad_s"));
    std::fflush(stdout);
}

void hold(edge_agent::ns_t checked_ns, const std::string& reason) {
    std::printf("@%lld hold\n", static_cast<long long>(checked_ns));
    std::fflush(stdout);
    std::fprintf(stderr, "hold: %s\n", reason.c_str());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 && argc != 3) return std::fprintf(stderr, "usage: controller FOLDER [INSTRUCTION]\n"), 2;
    for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { is_ending = 1; });
    try {
        edge_agent::Agent agent(argv[1]);
        if (argc == 3) agent.instruct(argv[2]);
        for (bool is_holding = false; !is_ending;) {
            const edge_agent::Action* action = agent.next(50);  // 20 set-points per second, as an autopilot wants them
            const bool is_moving = action != nullptr && can_follow(*action);
            if (is_moving) move(agent.checked_ns(), *action);
            else if (!is_holding) hold(agent.checked_ns(), action ? "action " + action->type : agent.reason());
            is_holding = !is_moving;
        }
        hold(edge_agent::clock_ns(CLOCK_MONOTONIC), "the controller ends");
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "controller: %s\n", error.what()), 1;
    }
}
