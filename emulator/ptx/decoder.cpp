// What decoding an instruction asks of its name and its operands.
#include <algorithm>

#include "machine.h"

namespace ptx {

File file_of(const std::string& type) {
  if (type == "pred") return File::predicate;
  return size_of(type) == 8 ? File::b64 : File::b32;
}

int size_of(const std::string& type) {
  if (type == "bf16x2" || type == "f16x2" || type == "tf32") return 4;
  if (type == "bf16") return 2;
  const size_t digits = type.find_first_of("0123456789");
  if (digits == std::string::npos || digits == 0) throw Error("no such type: ." + type);
  return std::stoi(type.substr(digits)) / 8;
}

bool Decoder::has(const char* part) const {
  return std::find(name.begin(), name.end(), part) != name.end();
}

void Decoder::write(int operand, File file) {
  i->r.push_back(destination(operands.at(operand), file));
  check(file);
  ++i->writes;
}

// Conversions, loads and stores take wider registers than their type; nothing else does.
void Decoder::check(File file) const {
  const bool wider = name[0] == "cvt" || name[0] == "ld" || name[0] == "st";
  if (!wider && i->r.back().file != file) unknown("a register of another size");
}

void Decoder::read(int operand, File file) {
  const Operand& o = operands.at(operand);
  if (o.kind == Operand::list) {
    for (const Operand& part : o.inner) {
      i->r.push_back(source(part, file));
      check(file);
    }
  } else {
    i->r.push_back(source(o, file));
    check(file);
  }
}

void Decoder::address(int operand, int which, File base) {
  const Operand& o = operands.at(operand);
  if (o.kind != Operand::address) unknown("expected an address");
  i->offset[which] = static_cast<int64_t>(o.value);
  i->r.push_back(source(o.inner.at(0), base));
}

void Decoder::unknown(const std::string& what) const {
  throw Error("PTX line " + std::to_string(i->line) + ": unknown instruction: " + i->text +
              (what.empty() ? "" : " (" + what + ")"));
}

}  // namespace ptx
