// PTX text to programs: declarations with their scopes, and instructions that the families of
// instructions decode.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <optional>

#include "machine.h"
#include "tokens.h"

namespace ptx {

namespace {

// Names of the module, which every kernel of it sees.
struct Module {
  std::map<std::string, uint64_t> symbols;
  std::vector<uint8_t> constants;
  uint32_t shared = 0;
  std::string dynamic;  // the name of dynamic shared memory
  std::map<int, std::string> files;
};

class Parser final : public Decoder {
 public:
  explicit Parser(const std::string& text) : tokens_(tokens_of(text)) {}

  std::map<std::string, Program> all() {
    std::map<std::string, Program> found;
    while (!peek().empty()) {
      const std::string word = take();
      if (word == ".version" || word == ".address_size") {
        take();
      } else if (word == ".target") {
        do take();
        while (accept(","));
      } else if (word == ".file") {
        file();
      } else if (word == ".section") {
        take();
        skip_braces();
      } else if (word == ".entry") {
        Program p = entry();
        found.emplace(p.name, std::move(p));
      } else if (word == ".func") {
        skip_function();
      } else if (word == ".shared" || word == ".global" || word == ".const") {
        variable(word);
      }  // .visible, .extern, .weak say nothing that matters here
    }
    return found;
  }

  // ---- Decoder

  Register source(const Operand& operand, File file) override {
    if (operand.kind == Operand::number) return constant(operand.value, file);
    if (operand.kind != Operand::name) fail(line_, "expected a register or a number");
    if (operand.text == "_") return constant(0, file);
    if (operand.text == "WARP_SZ") return constant(kLanes, file);
    if (const auto special = special_of(operand.text))
      return special_register(operand.text, *special);
    if (const auto r = find_register(operand.text)) return *r;
    return constant(symbol_or_number(operand), file);
  }

  Register destination(const Operand& operand, File file) override {
    if (operand.kind == Operand::none || operand.text == "_") return fresh(file);
    if (operand.kind != Operand::name) fail(line_, "expected a register to write to");
    const auto r = find_register(operand.text);
    if (!r) fail(line_, "no register " + operand.text);
    return *r;
  }

  uint64_t symbol_or_number(const Operand& operand) override {
    if (operand.kind == Operand::number) return operand.value;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto s = scope->symbols.find(operand.text); s != scope->symbols.end())
        return s->second;
    if (operand.text == module_.dynamic) return dynamic_shared();
    const auto s = module_.symbols.find(operand.text);
    if (s == module_.symbols.end()) fail(line_, "no such name: " + operand.text);
    return s->second;
  }

 private:
  struct Scope {
    int id;
    std::map<std::string, Register> registers;
    std::map<std::string, uint64_t> symbols;
  };

  // ---- tokens

  const std::string& peek(int ahead = 0) const { return tokens_[at_ + ahead].text; }
  std::string take() {
    line_ = tokens_[at_].line;
    if (tokens_[at_].text.empty()) fail(line_, "the text ends in the middle");
    return tokens_[at_++].text;
  }
  bool accept(const char* text) {
    if (peek() != text) return false;
    take();
    return true;
  }
  void expect(const char* text) {
    const std::string found = take();
    if (found != text) fail(line_, "expected " + std::string(text) + ", found " + found);
  }
  void skip_braces() {
    expect("{");
    for (int depth = 1; depth;) {
      const std::string t = take();
      depth += (t == "{") - (t == "}");
    }
  }
  void skip_function() {
    while (peek() != "{" && peek() != ";") take();
    if (peek() == "{")
      skip_braces();
    else
      take();
  }
  void file() {
    const int number = std::stoi(take());
    const std::string path = take();
    const size_t slash = path.rfind('/');
    module_.files[number] = path.substr(slash == std::string::npos ? 1 : slash + 1);
    module_.files[number].pop_back();
    while (accept(",")) take();
  }

  // ---- declarations

  // `.align 16 .b8 name[64] = {…};` behind the space's name
  void variable(const std::string& space) {
    uint32_t align = 1, element = 1;
    while (peek()[0] == '.') {
      const std::string word = take();
      if (word == ".align")
        align = std::stoi(take());
      else if (word.size() > 2)
        element = size_of(word.substr(1));
    }
    align = std::max(align, element);
    const std::string name = take();
    uint32_t count = 1;
    bool open = false;
    while (accept("[")) {
      open = peek() == "]";
      if (!open) count *= number_of(take());
      expect("]");
    }
    std::vector<uint64_t> values;
    if (accept("=")) {
      const bool braces = accept("{");
      do values.push_back(number_of(take()));
      while (accept(","));
      if (braces) expect("}");
    }
    expect(";");
    if (space == ".shared") {
      if (open) {
        module_.dynamic = name;
        return;
      }
      module_.shared = (module_.shared + align - 1) / align * align;
      module_.symbols[name] = module_.shared;
      module_.shared += count * element;
    } else {
      auto& bytes = module_.constants;
      bytes.resize((bytes.size() + align - 1) / align * align);
      module_.symbols[name] = kConstantWindow + bytes.size();
      const size_t from = bytes.size();
      bytes.resize(from + count * element);
      for (size_t n = 0; n < values.size(); ++n)
        std::memcpy(&bytes[from + n * element], &values[n], element);
    }
  }

  void local_variable(const std::string& space) {
    uint32_t align = 1, element = 1;
    while (peek()[0] == '.') {
      const std::string word = take();
      if (word == ".align")
        align = std::stoi(take());
      else
        element = size_of(word.substr(1));
    }
    const std::string name = take();
    uint32_t count = 1;
    if (accept("[")) {
      count = number_of(take());
      expect("]");
    }
    expect(";");
    uint32_t& used = space == ".local" ? program_.local : program_.static_shared;
    used = (used + align - 1) / align * align;
    scopes_.back().symbols[name] = used;
    used += count * element;
  }

  uint32_t dynamic_shared() const {
    return (program_.static_shared + kDynamicAlignment - 1) / kDynamicAlignment * kDynamicAlignment;
  }

  Register fresh(File file) { return {file, program_.registers[static_cast<int>(file)]++}; }

  Register constant(uint64_t value, File file) {
    const auto key = std::make_pair(file, value);
    const auto known = constants_.find(key);
    if (known != constants_.end()) return known->second;
    const Register r = fresh(file);
    program_.numbers.push_back({r, value});
    return constants_[key] = r;
  }

  Register special_register(const std::string& name, Special special) {
    const auto known = special_.find(name);
    if (known != special_.end()) return known->second;
    const Register r = fresh(File::b32);
    program_.specials.emplace_back(r, special);
    return special_[name] = r;
  }

  std::optional<Register> find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto r = scope->registers.find(name); r != scope->registers.end()) return r->second;
    return std::nullopt;
  }

  void declare_registers() {
    const File file = file_of(take().substr(1));
    do {
      const std::string name = take();
      if (accept("<")) {
        const int count = std::stoi(take());
        expect(">");
        for (int n = 0; n < count; ++n)
          scopes_.back().registers[name + std::to_string(n)] = fresh(file);
      } else {
        scopes_.back().registers[name] = fresh(file);
      }
    } while (accept(","));
    expect(";");
  }

  // ---- kernels

  Program entry() {
    program_ = {};
    scopes_ = {{0, {}, {}}};
    next_scope_ = 1;
    constants_.clear(), special_.clear(), labels_.clear(), jumps_.clear();
    program_.name = take();
    program_.static_shared = module_.shared;
    if (accept("(")) {
      while (!accept(")")) parameter();
    }
    while (peek() != "{") {
      const std::string word = take();
      if (word == ".reqntid") {
        program_.threads = std::stoi(take());
        while (accept(",")) program_.threads *= std::stoi(take());
      } else if (word == ".maxntid" || word == ".minnctapersm" || word == ".maxnreg" ||
                 word == ".reqnctapercluster") {
        do take();
        while (accept(","));
      }
    }
    expect("{");
    body();
    for (const auto& [at, label, scope, line] : jumps_)
      program_.code[at].target = find(label, scope, line);
    program_.constants = module_.constants;
    return std::move(program_);
  }

  void parameter() {
    expect(".param");
    uint32_t align = 0, element = 0;
    while (peek()[0] == '.') {
      const std::string word = take();
      if (word == ".align") {
        const uint32_t n = std::stoi(take());
        if (!element || element == 1) align = n;  // of a pointer's target, where a type came before
      } else if (word != ".ptr" && word != ".global" && word != ".shared" && word != ".const" &&
                 word != ".local" && word != ".param") {
        element = size_of(word.substr(1));
      }
    }
    align = std::max(element == 1 ? align : element, element);
    Parameter p{take(), 0, element};
    if (accept("[")) {
      p.size = element * number_of(take());
      expect("]");
    }
    uint32_t& used = program_.parameter_bytes;
    used = (used + align - 1) / align * align;
    p.offset = used;
    used += p.size;
    scopes_.back().symbols[p.name] = kParameterWindow + p.offset;
    program_.parameters.push_back(p);
    accept(",");
  }

  void body() {
    std::vector<int> open{0};
    for (;;) {
      const std::string word = take();
      if (word == "}") {
        scopes_.pop_back();
        if (scopes_.empty()) break;
      } else if (word == "{") {
        scopes_.push_back({next_scope_++, {}, {}});
        parents_[scopes_.back().id] = scopes_[scopes_.size() - 2].id;
      } else if (word == ".reg") {
        declare_registers();
      } else if (word == ".local" || word == ".shared") {
        local_variable(word);
      } else if (word == ".loc") {
        loc();
      } else if (word == ".pragma") {
        while (take() != ";") {
        }
      } else if (peek() == ":" && word[0] != '@') {
        take();
        labels_[{word, scopes_.back().id}] = program_.code.size();
      } else {
        statement(word);
      }
    }
    Instruction end;
    end.flow = Flow::exit, end.text = "ret", end.run = nullptr;
    program_.code.push_back(end);
  }

  void loc() {
    const int file = std::stoi(take());
    const std::string line = take();
    take();
    while (accept(",")) {  // function_name …, inlined_at …
      while (peek() != "," && tokens_[at_].line == line_) take();
    }
    program_.sources.push_back(module_.files[file] + ":" + line);
  }

  void statement(std::string word) {
    Instruction made;
    i = &made;
    made.line = line_;
    made.source = program_.sources.size();
    if (word == "@") {
      made.guarded = true;
      made.guard_negated = accept("!");
      Operand guard;
      guard.kind = Operand::name, guard.text = take();
      made.guard = source(guard, File::predicate).index;
      made.text = std::string("@") + (made.guard_negated ? "!" : "") + guard.text + " ";
      word = take();
    }
    made.text += word;
    made.name = word;
    name = split(word);
    operands.clear();
    while (peek() != ";") {
      operands.push_back(operand());
      if (peek() != ";" && !accept("|")) expect(",");  // a|b are two destinations
    }
    take();
    program_.asynchronous_proxy |= name[0] == "wgmma" || has("bulk");
    if (name[0] == "bra") {
      made.flow = Flow::branch;
      jumps_.push_back({program_.code.size(), operands.at(0).text, scopes_.back().id, made.line});
    } else if (name[0] == "ret" || name[0] == "exit") {
      made.flow = Flow::exit;
    } else {
      for (const auto family : {moves, arithmetic, bits, comparison, conversion, control, memory,
                                matrix, warpgroup, asynchronous})
        if (family(*this)) break;
      if (!made.run) unknown();
    }
    program_.code.push_back(std::move(made));
  }

  Operand operand() {
    Operand o;
    std::string word = take();
    i->text += " " + word;
    if (word == "!") {
      o.negated = true;
      word = take();
    }
    if (word == "{") {
      o.kind = Operand::list;
      while (!accept("}")) {
        o.inner.push_back(operand());
        accept(",");
      }
    } else if (word == "[") {
      o.kind = Operand::address;
      o.inner.push_back(operand());
      if (accept("+")) o.value = number_of(take());
      while (accept(",")) o.inner.push_back(operand());
      expect("]");
    } else if (is_number(word)) {
      o.kind = Operand::number;
      o.value = number_of(word);
    } else {
      o.kind = Operand::name;
      o.text = word;
      if (peek() == "+" && peek(-1) != "]") {  // a symbol and an offset
        take();
        o.kind = Operand::number;
        Operand symbol;
        symbol.kind = Operand::name, symbol.text = word;
        if (find_register(word)) {
          --at_;
          o.kind = Operand::name;
        } else {
          o.value = symbol_or_number(symbol) + number_of(take());
        }
      }
    }
    return o;
  }

  uint32_t find(const std::string& label, int scope, int line) {
    for (;; scope = parents_[scope]) {
      const auto l = labels_.find({label, scope});
      if (l != labels_.end()) return l->second;
      if (scope == 0) fail(line, "no label " + label);
    }
  }

  struct Jump {
    size_t at;
    std::string label;
    int scope, line;
  };

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int line_ = 0, next_scope_ = 1;
  Module module_;
  Program program_;
  std::vector<Scope> scopes_;
  std::map<int, int> parents_;
  std::map<std::pair<File, uint64_t>, Register> constants_;
  std::map<std::string, Register> special_;
  std::map<std::pair<std::string, int>, uint32_t> labels_;
  std::vector<Jump> jumps_;
};

}  // namespace

std::map<std::string, Program> parse(const std::string& text) { return Parser(text).all(); }

}  // namespace ptx
