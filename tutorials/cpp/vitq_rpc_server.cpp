// A server of TVM's RPC for boards: it needs this program and TVM's two runtime libraries, no Python.
//
//   vitq_rpc_server [--host 127.0.0.1] [--port 9090] [--port-end PORT] [--key KEY] [--threads N]
//                   [--tracker HOST:PORT] [--custom-addr ADDRESS] [--accept-timeout SECONDS]
//
// It speaks the protocol of `python -m tvm.exec.rpc_server`: clients are `tvm-vitq verify/bench/tune
// --rpc` and whatever else uses tvm.rpc. One client is served at a time, each by a process of its own
// in a folder of its own, which is removed when it ends. Whoever can connect can run code here and the
// key is no password: listen on an address that only a trusted network reaches (--host 0.0.0.0: all).
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "vitq/file.hpp"

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
  int port = 9090, port_end = 0, accept_timeout = 10;
};

[[noreturn]] void Fail(const std::string& why) { throw std::runtime_error(why); }

std::string Reason() { return std::strerror(errno); }

// A descriptor that is closed at the end of its scope.
class Socket {
 public:
  explicit Socket(int number = -1) : number_(number) {}
  Socket(Socket&& other) noexcept : number_(other.Release()) {}
  Socket& operator=(Socket&& other) noexcept {
    Close();
    number_ = other.Release();
    return *this;
  }
  ~Socket() { Close(); }
  int number() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }
  void Close() {
    if (number_ >= 0) close(number_);
    number_ = -1;
  }
  // Whoever does not answer for so long is given up; 0 waits for ever.
  void SetTimeout(int seconds) const {
    timeval limit{seconds, 0};
    setsockopt(number_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(number_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  }
  void Send(const void* data, size_t size) const {
    const char* at = static_cast<const char*>(data);
    while (size > 0) {
      ssize_t done = send(number_, at, size, MSG_NOSIGNAL);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) Fail("the other end is gone: " + Reason());
      at += done;
      size -= static_cast<size_t>(done);
    }
  }
  void Receive(void* data, size_t size) const {
    char* at = static_cast<char*>(data);
    while (size > 0) {
      ssize_t done = recv(number_, at, size, 0);
      if (done < 0 && errno == EINTR) continue;
      if (done == 0) Fail("the other end closed the connection");
      if (done < 0) Fail("the other end does not answer: " + Reason());
      at += done;
      size -= static_cast<size_t>(done);
    }
  }
  void SendNumber(int32_t value) const { Send(&value, sizeof value); }
  int32_t ReceiveNumber() const {
    int32_t value;
    Receive(&value, sizeof value);
    return value;
  }
  void SendText(const std::string& text) const {
    SendNumber(static_cast<int32_t>(text.size()));
    Send(text.data(), text.size());
  }
  std::string ReceiveText(int32_t longest) const {
    int32_t size = ReceiveNumber();
    if (size < 0 || size > longest) Fail("a text of " + std::to_string(size) + " bytes");
    std::string text(static_cast<size_t>(size), '\0');
    Receive(&text[0], text.size());
    return text;
  }

 private:
  int Release() {
    int number = number_;
    number_ = -1;
    return number;
  }
  int number_;
};

struct Addresses {
  Addresses(const std::string& host, int port, bool listening) {
    addrinfo wanted{};
    wanted.ai_socktype = SOCK_STREAM;
    wanted.ai_flags = listening ? AI_PASSIVE : 0;
    int status = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &wanted, &first);
    if (status != 0) Fail("unknown address " + host + ": " + gai_strerror(status));
  }
  ~Addresses() { freeaddrinfo(first); }
  addrinfo* first = nullptr;
};

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
  // To be called now and then: a key that was given to a client who never came is replaced.
  void Refresh() {
    bool pending = Ask("[" + std::to_string(kPendingKeys) + "]").find(Quoted(match_key_)) !=
                   std::string::npos;
    if (pending) {
      taken_ = false;
    } else if (!taken_) {
      taken_ = true;
      since_ = Clock::now();
    } else if (Clock::now() - since_ > std::chrono::seconds(6)) {
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

// Serves one client, in a process of its own.
void Serve(int number, const std::string& folder) {
  if (chdir(folder.c_str()) != 0) Fail("cannot enter " + folder + ": " + Reason());
  auto path = [folder](const std::string& name) {
    return name.rfind('/', 0) == 0 ? name : folder + "/" + name;
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
std::string Await(pid_t child, double timeout) {
  const auto start = Clock::now();
  for (int status = 0;;) {
    pid_t ended = waitpid(child, &status, timeout > 0 ? WNOHANG : 0);
    if (ended < 0 && errno == EINTR) continue;
    if (ended != 0) {
      if (WIFSIGNALED(status))
        return std::string("the server's process was ended by ") + strsignal(WTERMSIG(status));
      if (WEXITSTATUS(status) == 0) return "";
      return "the server's process ended with status " + std::to_string(WEXITSTATUS(status));
    }
    if (std::chrono::duration<double>(Clock::now() - start).count() > timeout) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      return "RPCSessionTimeoutError: the session took more than its time";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

void Session(const Client& client, const Socket& listener) {
  std::string folder = (std::filesystem::temp_directory_path() / "vitq-rpc-XXXXXX").string();
  if (mkdtemp(&folder[0]) == nullptr) Fail("cannot make " + folder + ": " + Reason());
  std::cerr << client.from << " connected" << std::endl;
  pid_t child = fork();
  if (child == 0) {
    int status = 0;
    try {
      close(listener.number());
      Serve(client.socket.number(), folder);
    } catch (const std::exception& why) {
      std::cerr << vitq::detail::FirstLine(why.what()) << std::endl;
      status = 1;
    }
    _exit(status);
  }
  std::string why = child < 0 ? "cannot start a process: " + Reason() : Await(child, client.timeout);
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
  int port = 0;
  Socket listener = Listen(options, &port);
  std::cout << "listening on " << options.host << ":" << port << std::endl;
  std::unique_ptr<Tracker> tracker;
  while (true) {
    try {
      if (!options.tracker.empty() && tracker == nullptr) {
        tracker = std::make_unique<Tracker>(options, port);
        std::cerr << "known to the tracker " << options.tracker << std::endl;
      }
      pollfd waiting{listener.number(), POLLIN, 0};
      int ready = poll(&waiting, 1, tracker ? 2000 : -1);
      if (ready > 0) {
        Client client = Accept(listener, tracker ? tracker->match_key() : options.key, options);
        if (!client.socket) continue;
        Session(client, listener);
        if (tracker) tracker->Offer();
      } else if (tracker) {
        tracker->Refresh();
      }
    } catch (const std::exception& why) {
      std::cerr << why.what() << std::endl;
      if (tracker == nullptr && options.tracker.empty()) throw;
      tracker.reset();
      std::this_thread::sleep_for(std::chrono::seconds(2));
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
    if (name.rfind("--", 0) != 0) Fail("unknown argument " + name);
    if (i + 1 >= argc) Fail(name + " is unknown or wants a value");
    const char* value = argv[++i];
    if (name == "--host") options.host = value;
    else if (name == "--key") options.key = value;
    else if (name == "--tracker") options.tracker = value;
    else if (name == "--custom-addr") options.custom_address = value;
    else if (name == "--port") options.port = Number(name, value, 0, 65535);
    else if (name == "--port-end") options.port_end = Number(name, value, 0, 65535);
    else if (name == "--accept-timeout") options.accept_timeout = Number(name, value, 1, 3600);
    else if (name == "--threads")
      setenv("TVM_NUM_THREADS", std::to_string(Number(name, value, 1, 4096)).c_str(), 1);
    else Fail("unknown option " + name);
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
    Run(Parse(argc, argv));
  } catch (const std::exception& why) {
    std::cerr << "vitq_rpc_server: " << why.what() << std::endl;
    return 2;
  }
  return 0;
}
