// The words of a PTX text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Token {
  std::string text;
  int line;
};

// The last one is empty.
std::vector<Token> tokens_of(const std::string& text);

bool is_number(const std::string& text);
uint64_t number_of(const std::string& text);
std::vector<std::string> split(const std::string& opcode);  // at its points

// Throws Error.
[[noreturn]] void fail(int line, const std::string& what);

}  // namespace ptx
