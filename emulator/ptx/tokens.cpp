#include "tokens.h"

#include <algorithm>
#include <cctype>

#include "program.h"

namespace ptx {

void fail(int line, const std::string& what) {
  throw Error("PTX line " + std::to_string(line) + ": " + what);
}

std::vector<Token> tokens_of(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  const auto part_of_name = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.' ||
           c == '%';
  };
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c))) {
      ++at;
    } else if (text.compare(at, 2, "//") == 0) {
      at = std::min(text.find('\n', at), text.size());
    } else if (text.compare(at, 2, "/*") == 0) {
      const size_t end = std::min(text.find("*/", at), text.size() - 2) + 2;
      for (; at < end; ++at) line += text[at] == '\n';
    } else if (c == '"') {
      const size_t end = text.find('"', at + 1);
      tokens.push_back({text.substr(at, end - at + 1), line});
      at = end + 1;
    } else if (part_of_name(c) ||
               (c == '-' && std::isdigit(static_cast<unsigned char>(text[at + 1])))) {
      size_t end = at + 1;
      while (end < text.size()) {
        if (part_of_name(text[end]))
          ++end;
        else if (text.compare(end, 2, "::") == 0)
          end += 2;
        else
          break;
      }
      tokens.push_back({text.substr(at, end - at), line});
      at = end;
    } else {
      tokens.push_back({std::string(1, c), line});
      ++at;
    }
  }
  tokens.push_back({"", line});
  return tokens;
}

uint64_t number_of(const std::string& text) {
  if (text.size() == 10 && (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0F") == 0))
    return std::stoull(text.substr(2), nullptr, 16);
  if (text.size() == 18 && (text.compare(0, 2, "0d") == 0 || text.compare(0, 2, "0D") == 0))
    return std::stoull(text.substr(2), nullptr, 16);
  if (text[0] == '-') return static_cast<uint64_t>(std::stoll(text, nullptr, 0));
  return std::stoull(text, nullptr, 0);  // a U behind it is skipped
}

bool is_number(const std::string& text) {
  return std::isdigit(static_cast<unsigned char>(text[0])) ||
         (text[0] == '-' && text.size() > 1 && std::isdigit(static_cast<unsigned char>(text[1])));
}

std::vector<std::string> split(const std::string& opcode) {
  std::vector<std::string> parts;
  size_t from = 0;
  while (from <= opcode.size()) {
    const size_t to = std::min(opcode.find('.', from), opcode.size());
    parts.push_back(opcode.substr(from, to - from));
    from = to + 1;
  }
  return parts;
}

}  // namespace ptx
