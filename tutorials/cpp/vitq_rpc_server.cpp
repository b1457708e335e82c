// A server of TVM's RPC for boards: it needs this program and TVM's two runtime libraries, no Python.
//
// It speaks the protocol of `python -m tvm.exec.rpc_server`: clients are `tvm-vitq verify/bench/tune
// --rpc` and whatever else uses tvm.rpc. One client is served at a time, each by a process of its own
// in a folder of its own, which is removed when it ends; SIGINT, SIGTERM and SIGHUP end the session and
// the server. Whoever can connect can run code here and the key is no password: listen on an address
// that only a trusted network reaches (--host 0.0.0.0: all).
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>

#include "socket.hpp"
#include "vitq/file.hpp"
#include "vitq/threads.hpp"

namespace {

namespace ffi = tvm::ffi;
using Clock = std::chrono::steady_clock;

// Words of the protocol: tvm/rpc/base.py.
constexpr int32_t kMagic = 0xFF271, kSuccess = kMagic, kMismatch = kMagic + 2;
constexpr int32_t kTrackerMagic = 0x2F271;
constexpr int kPut = 3, kUpdateInfo = 5, kPendingKeys = 7;
constexpr int32_t kLongestKey = 4096, kLongestReply = 1 << 24;

struct Options {
  std::string host = "127.0.0.1", key, tracker, custom_address;
  int port = 9090, port_end = 0, accept_timeout = 10, offer_again = 6;
  bool help = false;
};

constexpr char kUsage[] =
    "usage: vitq_rpc_server [--host 127.0.0.1] [--port 9090] [--port-end PORT] [--key KEY]\n"
    "                       [--threads N] [--tracker HOST:PORT] [--custom-addr ADDRESS]\n"
    "                       [--accept-timeout SECONDS] [--offer-again SECONDS]\n"
    "--port 0 lets the system choose; with --port-end the first free port of the range is taken.\n"
    "--tracker wants --key; what it lent to a client who never came is offered again after\n"
    "--offer-again seconds (6).\n";

// Listens on the first free port of the range; port 0 lets the system choose.
Socket Listen(const Options& options, int* port) {
  for (int number = options.port; number <= options.port_end; ++number) {
    Addresses found(options.host, number, true);
    Socket made(socket(found.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    int yes = 1;
    setsockopt(made.number(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (made && bind(made.number(), found.first->ai_addr, found.first->ai_addrlen) == 0 &&
        listen(made.number(), 8) == 0) {
      sockaddr_storage bound{};
      socklen_t size = sizeof bound;
      getsockname(made.number(), reinterpret_cast<sockaddr*>(&bound), &size);
      *port = ntohs(bound.ss_family == AF_INET6
                        ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                        : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
      return made;
    }
    if (errno != EADDRINUSE) Fail("cannot listen on " + options.host + ": " + Reason());
  }
  Fail("every port of " + std::to_string(options.port) + " to " +
       std::to_string(options.port_end) + " is in use; give another with --port");
}

std::string Quoted(const std::string& text) { return '"' + text + '"'; }

// The connection to a tracker, and the key under which it lends this server to a client, once.
class Tracker {
 public:
  Tracker(const Options& options, int port) : options_(options), port_(port) {
    size_t colon = options.tracker.rfind(':');
    Addresses found(options.tracker.substr(0, colon),
                    std::atoi(options.tracker.c_str() + colon + 1), false);
    socket_ = Socket(socket(found.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    socket_.SetTimeout(30);
    if (connect(socket_.number(), found.first->ai_addr, found.first->ai_addrlen) != 0)
      Fail("cannot reach the tracker " + options.tracker + ": " + Reason());
    socket_.SendNumber(kTrackerMagic);
    if (socket_.ReceiveNumber() != kTrackerMagic) Fail(options.tracker + " is no RPC tracker");
    Ask("[" + std::to_string(kUpdateInfo) + ", {\"key\": " + Quoted("server:" + options.key) +
        ", \"addr\": [" + Address() + ", " + std::to_string(port) + "]}]");
    Offer();
  }
  const std::string& match_key() const { return match_key_; }
  // Asks to be lent; a key serves one client.
  void Offer() {
    static std::mt19937_64 random{std::random_device{}()};
    match_key_ = options_.key + ":" + std::to_string(random());
    Ask("[" + std::to_string(kPut) + ", " + Quoted(options_.key) + ", [" + std::to_string(port_) +
        ", " + Quoted(match_key_) + "], " + Address() + "]");
    taken_ = false;
  }
  // To be called every second or two: a key that was given to a client who never came is replaced.
  void Refresh() {
    bool pending = Ask("[" + std::to_string(kPendingKeys) + "]").find(Quoted(match_key_)) !=
                   std::string::npos;
    if (pending) {
      taken_ = false;
    } else if (!taken_) {
      taken_ = true;
      since_ = Clock::now();
    } else if (Clock::now() - since_ > std::chrono::seconds(options_.offer_again)) {
      Offer();
    }
  }

 private:
  std::string Address() const {
    return options_.custom_address.empty() ? "null" : Quoted(options_.custom_address);
  }
  std::string Ask(const std::string& request) {
    socket_.SendText(request);
    return socket_.ReceiveText(kLongestReply);
  }
  const Options& options_;
  int port_;
  Socket socket_;
  std::string match_key_;
  bool taken_ = false;
  Clock::time_point since_;
};

struct Client {
  Socket socket;
  std::string from;
  double timeout = 0;  // seconds that the session may take; 0: any
};

// Accepts a connection and shakes hands; without a client if it is none, or has another key.
Client Accept(const Socket& listener, const std::string& match_key, const Options& options) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  Client client;
  client.socket = Socket(accept4(listener.number(), reinterpret_cast<sockaddr*>(&address), &size,
                                 SOCK_CLOEXEC));
  if (!client.socket) return client;
  char host[NI_MAXHOST] = "?";
  getnameinfo(reinterpret_cast<sockaddr*>(&address), size, host, sizeof host, nullptr, 0,
              NI_NUMERICHOST);
  client.from = host;
  // A client that was switched off must not keep the board for ever.
  int yes = 1, idle = 30, interval = 10, probes = 3;
  setsockopt(client.socket.number(), SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
  setsockopt(client.socket.number(), IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  setsockopt(client.socket.number(), IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  setsockopt(client.socket.number(), IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  setsockopt(client.socket.number(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  try {
    client.socket.SetTimeout(options.accept_timeout);
    if (client.socket.ReceiveNumber() != kMagic) Fail("it does not speak TVM's RPC");
    std::istringstream words(client.socket.ReceiveText(kLongestKey));
    std::string found, option;
    words >> found;
    if (found != "client:" + match_key) {
      client.socket.SendNumber(kMismatch);
      Fail("it has another key");
    }
    while (words >> option)
      if (option.rfind("-timeout=", 0) == 0) client.timeout = std::atof(option.c_str() + 9);
    client.socket.SendNumber(kSuccess);
    client.socket.SendText("server:" + options.key);
    client.socket.SetTimeout(0);
  } catch (const std::exception& why) {
    std::cerr << host << " refused: " << why.what() << std::endl;
    client.socket.Close();
  }
  return client;
}

std::string Describe() {
  std::string features;
  for (const std::string& feature : vitq::detail::CpuFeatures())
    features += (features.empty() ? "" : ", ") + Quoted(feature);
  return "{\"architecture\": " + Quoted(vitq::MachineName(vitq::kThisMachine)) +
         ", \"cores\": " + std::to_string(std::thread::hardware_concurrency()) +
         ", \"features\": [" + features + "]}";
}

// What ends a process of the server, and what tells the server to end; both are read, not handled.
class Signals {
 public:
  Signals() {
    signal(SIGCHLD, SIG_DFL);
    sigset_t wanted;
    sigemptyset(&wanted);
    for (int number : {SIGCHLD, SIGINT, SIGTERM, SIGHUP}) {
      struct sigaction set{};
      sigaction(number, nullptr, &set);
      if (set.sa_handler != SIG_IGN) sigaddset(&wanted, number);  // nohup, or a job of a script
    }
    sigprocmask(SIG_BLOCK, &wanted, &before_);
    source_ = Socket(signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!source_) Fail("cannot wait for signals: " + Reason());
  }
  // For a process that shall be ended by them as usual.
  void Restore() const { sigprocmask(SIG_SETMASK, &before_, nullptr); }
  bool stopped() const { return stopped_; }
  // Waits for a signal or, if it is given, a connection; returns whether there is one. Negative
  // milliseconds are for ever.
  bool Wait(int milliseconds, const Socket* listener = nullptr) {
    pollfd waiting[2] = {{source_.number(), POLLIN, 0},
                         {listener ? listener->number() : -1, POLLIN, 0}};
    if (poll(waiting, 2, milliseconds) <= 0) return false;
    for (signalfd_siginfo found; read(source_.number(), &found, sizeof found) == sizeof found;)
      stopped_ |= found.ssi_signo != SIGCHLD;
    return waiting[1].revents != 0;
  }

 private:
  Socket source_;
  sigset_t before_;
  bool stopped_ = false;
};

// Serves one client, in a process of its own.
void Serve(int number, const std::string& folder) {
  if (chdir(folder.c_str()) != 0) Fail("cannot enter " + folder + ": " + Reason());
  auto path = [folder](const std::string& name) {
    const std::filesystem::path plain = std::filesystem::path(name).lexically_normal();
    if (plain.empty() || plain.is_absolute() || *plain.begin() == "..")
      Fail("a file's name must stay in the session's folder, " + Quoted(name) + " does not");
    return folder + "/" + plain.string();
  };
  using Text = ffi::String;
  ffi::Function::SetGlobal("tvm.rpc.server.workpath",
                           ffi::Function::FromTyped([path](Text name) { return Text(path(name)); }),
                           true);
  ffi::Function::SetGlobal("tvm.rpc.server.load_module",
                           ffi::Function::FromTyped([path](Text name) {
                             return ffi::Module::LoadFromFile(path(name));
                           }),
                           true);
  ffi::Function::SetGlobal("vitq.rpc.describe",
                           ffi::Function::FromTyped([] { return Text(Describe()); }), true);
  ffi::Function::GetGlobalRequired("rpc.ServerLoop")(number);
}

// Waits for the process; returns how it ended, "" if as it should.
std::string Await(pid_t child, double timeout, Signals* signals) {
  const auto start = Clock::now();
  for (int status = 0;;) {
    const pid_t ended = waitpid(child, &status, WNOHANG);
    if (ended < 0 && errno == EINTR) continue;
    if (ended != 0) {
      if (WIFSIGNALED(status))
        return std::string("the server's process was ended by ") + strsignal(WTERMSIG(status));
      if (WEXITSTATUS(status) == 0) return "";
      return "the server's process ended with status " + std::to_string(WEXITSTATUS(status));
    }
    const double left = timeout - std::chrono::duration<double>(Clock::now() - start).count();
    if (signals->stopped() || (timeout > 0 && left <= 0)) {
      kill(child, SIGKILL);
      while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
      return signals->stopped() ? "the server's process was told to end"
                                : "RPCSessionTimeoutError: the session took more than its time";
    }
    signals->Wait(timeout > 0 ? static_cast<int>(std::min(1e3 * left, 1e6)) + 1 : -1);
  }
}

void Session(const Client& client, const Socket& listener, Signals* signals) {
  std::string folder = (std::filesystem::temp_directory_path() / "vitq-rpc-XXXXXX").string();
  if (mkdtemp(&folder[0]) == nullptr) Fail("cannot make " + folder + ": " + Reason());
  std::cerr << client.from << " connected" << std::endl;
  pid_t child = fork();
  if (child == 0) {
    int status = 0;
    try {
      prctl(PR_SET_PDEATHSIG, SIGKILL);  // no session without the server
      signals->Restore();
      close(listener.number());
      Serve(client.socket.number(), folder);
    } catch (const std::exception& why) {
      std::cerr << vitq::detail::FirstLine(why.what()) << std::endl;
      status = 1;
    }
    _exit(status);
  }
  std::string why = child < 0 ? "the server's process cannot be started: " + Reason()
                              : Await(child, client.timeout, signals);
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  std::cerr << client.from << (why.empty() ? " left" : ": " + why) << std::endl;
  try {
    // The client, if it is still there, waits for a reply: this one says why there is none.
    if (!why.empty())
      ffi::Function::GetGlobalRequired("rpc.ReturnException")(client.socket.number(), why);
  } catch (const std::exception&) {
  }
}

void Run(const Options& options) {
  Signals signals;
  int port = 0;
  Socket listener = Listen(options, &port);
  std::cout << "listening on " << options.host << ":" << port << std::endl;
  std::unique_ptr<Tracker> tracker;
  std::string said;  // why the tracker is not reached: the same is said once
  const int watch = std::min(2000, 500 * options.offer_again);
  while (!signals.stopped()) {
    try {
      if (!options.tracker.empty() && tracker == nullptr) {
        tracker = std::make_unique<Tracker>(options, port);
        std::cerr << "known to the tracker " << options.tracker << std::endl;
      }
      if (signals.Wait(tracker ? watch : -1, &listener)) {
        Client client = Accept(listener, tracker ? tracker->match_key() : options.key, options);
        if (!client.socket) continue;
        Session(client, listener, &signals);
        if (tracker) tracker->Offer();
      } else if (tracker) {
        tracker->Refresh();
      }
    } catch (const std::exception& why) {
      const bool away = !options.tracker.empty() && tracker == nullptr;
      if (!away || said != why.what()) std::cerr << why.what() << std::endl;
      said = away ? why.what() : "";
      tracker.reset();
      signals.Wait(2000);
    }
  }
}

int Number(const std::string& name, const char* text, int least, int most) {
  char* end = nullptr;
  long value = std::strtol(text, &end, 10);
  if (end == text || *end != '\0' || value < least || value > most)
    Fail(name + " wants a number from " + std::to_string(least) + " to " + std::to_string(most));
  return static_cast<int>(value);
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      options.help = true;
      return options;
    }
    if (name.rfind("--", 0) != 0) Fail("unknown argument " + name + "; see --help");
    if (i + 1 >= argc) Fail(name + " is unknown or wants a value; see --help");
    const char* value = argv[++i];
    if (name == "--host") options.host = value;
    else if (name == "--key") options.key = value;
    else if (name == "--tracker") options.tracker = value;
    else if (name == "--custom-addr") options.custom_address = value;
    else if (name == "--port") options.port = Number(name, value, 0, 65535);
    else if (name == "--port-end") options.port_end = Number(name, value, 0, 65535);
    else if (name == "--accept-timeout") options.accept_timeout = Number(name, value, 1, 3600);
    else if (name == "--offer-again") options.offer_again = Number(name, value, 1, 3600);
    else if (name == "--threads") {
      const int threads = Number(name, value, 1, INT_MAX);
      if (threads > vitq::MostThreads()) Fail(vitq::TooManyThreads(value));
      setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
    } else Fail("unknown option " + name + "; see --help");
  }
  if (options.port_end < options.port) options.port_end = options.port;
  if (!options.tracker.empty() && (options.key.empty() ||
                                   options.tracker.find(':') == std::string::npos))
    Fail("--tracker wants HOST:PORT, and --key");
  for (const std::string& text : {options.key, options.custom_address})
    if (text.find_first_of("\"\\ \t\n") != std::string::npos)
      Fail("--key and --custom-addr take no spaces, quotes or backslashes");
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  try {
    const Options options = Parse(argc, argv);
    if (options.help)
      std::cout << kUsage << std::flush;
    else
      Run(options);
  } catch (const std::exception& why) {
    std::cerr << "vitq_rpc_server: " << why.what() << std::endl;
    return 2;
  }
  return 0;
}
