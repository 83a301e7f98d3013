// A PTX kernel as the machine runs it: every operand is a register or a number, every name
// resolved.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What stops a kernel: an error in the program, or what this machine does not know.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A bit per lane of a warp.
using Lanes = uint32_t;
constexpr int kLanes = 32;
constexpr Lanes kAllLanes = ~Lanes{0};

// Registers of one kind lie in one file. Those of 8 and 16 bits lie in the file of 32. Numbers and
// special registers are registers that the machine sets before a warp starts.
enum class File : uint8_t { predicate, b32, b64 };

struct Register {
  File file = File::b32;
  uint32_t index = 0;
};

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, Lanes);

enum class Flow : uint8_t { next, branch, exit, wait };

// `r` holds registers in the order of the text, the `writes` that it writes to first; an address is
// its base register, its offset in `offset`.
struct Instruction {
  Run run = nullptr;
  Flow flow = Flow::next;
  bool guarded = false, guard_negated = false;
  bool product = false;  // a wgmma, which looks after registers itself
  bool copy = false;     // of a register, as old as its source
  uint32_t guard = 0;    // a predicate
  std::vector<Register> r;
  int writes = 0;
  std::array<int64_t, 4> offset{};  // of the addresses, in the order of the text
  int64_t number = 0;               // what the decoder keeps of the name: a size, a count, a mode
  uint32_t target = 0;              // of a branch
  int line = 0;                     // in the PTX
  uint32_t source = 0;              // into Program::sources
  std::string name, text;           // its opcode; with its operands
};

struct Parameter {
  std::string name;
  uint32_t offset = 0, size = 0;
};

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  cluster_ctarank,
  cluster_nctarank,
  cluster_ctaid_x,
  cluster_nctaid_x,
  clusterid_x,
  nclusterid_x,
  clock,
  lanemask_lt,
  lanemask_le,
  lanemask_eq,
  lanemask_ge,
  lanemask_gt,
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> sources;     // "file:line" as .loc says
  std::array<uint32_t, 3> registers{};  // of each file
  struct Number {
    Register where;
    uint64_t value;
  };
  std::vector<Number> numbers;
  std::vector<std::pair<Register, Special>> specials;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t static_shared = 0;       // bytes of named shared memory; dynamic memory lies behind them
  uint32_t local = 0;               // bytes a thread
  std::vector<uint8_t> constants;   // .const and .global with their values
  bool asynchronous_proxy = false;  // has wgmma or bulk copies
  int threads = 0;                  // a block, as .reqntid says; 0: not said
};

// Every kernel of a text, by name. Throws Error: with the line, what is not understood.
std::map<std::string, Program> parse(const std::string& text);

// Addresses that generic pointers have. Global memory is the host's own.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kLocalWindow = uint64_t{2} << 60,
                   kParameterWindow = uint64_t{3} << 60, kConstantWindow = uint64_t{4} << 60,
                   kWindow = uint64_t{15} << 60;
// Shared addresses of another block of a cluster: its rank + 1 above these bits.
constexpr int kRankBits = 24;
constexpr uint32_t kDynamicAlignment = 1024;

}  // namespace ptx
