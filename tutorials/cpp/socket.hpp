// TCP connections as values, whose failures are exceptions with one line.
#pragma once

#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

[[noreturn]] inline void Fail(const std::string& why) { throw std::runtime_error(why); }

inline std::string Reason() { return std::strerror(errno); }

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
