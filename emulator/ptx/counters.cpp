// What accesses cost: sectors of global memory, passes over the banks of shared memory.
#include <algorithm>
#include <sstream>

#include "machine.h"

namespace ptx {

namespace {

// Sorted, each once.
void unique(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

}  // namespace

void Counters::of_global(const Instruction& i, Lanes lanes, const Longs& at, uint32_t size,
                         bool writes) {
  std::vector<uint64_t> sectors;
  each(lanes, [&](int l) {
    for (uint64_t s = at[l] / 32; s <= (at[l] + size - 1) / 32; ++s)
      if (sectors.empty() || sectors.back() != s) sectors.push_back(s);
  });
  unique(sectors);
  Site& site = this->at(i);
  ++site.requests;
  site.sectors += sectors.size();
  (writes ? bytes_written : bytes_read) += uint64_t{size} * __builtin_popcount(lanes);
}

// The chip serves 128 bytes at once; then words of the busiest bank.
void Counters::of_shared(const Instruction& i, Lanes lanes, const Longs& at, uint32_t size) {
  Site& site = this->at(i);
  const int at_once = std::max<int>(1, 128 / static_cast<int>(std::max(size, 4u)));
  std::vector<uint64_t> words;
  for (int from = 0; from < kLanes; from += at_once) {
    words.clear();
    for (int l = from; l < std::min(from + at_once, kLanes); ++l)
      if (lanes >> l & 1)
        for (uint32_t b = 0; b < size; b += 4) words.push_back((at[l] + b) / 4);
    if (words.empty()) continue;
    unique(words);
    std::array<int, 32> banks{};
    for (const uint64_t word : words) ++banks[word % 32];
    ++site.served;
    site.passes += *std::max_element(banks.begin(), banks.end());
  }
}

std::string Counters::as_json() const {
  std::map<std::string, Site> by_name, by_place;
  for (size_t n = 0; n < sites.size(); ++n) {
    const Instruction& i = program->code[n];
    by_name[i.name] += sites[n];
    by_place[i.name + " at " +
             (i.source ? program->sources[i.source - 1] : "line " + std::to_string(i.line))] +=
        sites[n];
  }
  std::ostringstream out;
  out << "{\"bytes_read\": " << bytes_read << ", \"bytes_written\": " << bytes_written;
  const auto list = [&](const char* title, const auto& sums, auto there, auto write) {
    out << ", \"" << title << "\": {";
    const char* comma = "";
    for (const auto& [name, site] : sums) {
      if (!there(site)) continue;
      out << comma << '"' << name << "\": ";
      write(site);
      comma = ", ";
    }
    out << '}';
  };
  list(
      "instructions", by_name, [](const Site& s) { return s.executed; },
      [&](const Site& s) { out << s.executed; });
  for (const auto& [place, sums] : {std::pair{"", &by_name}, std::pair{"_sites", &by_place}}) {
    const std::string global = std::string("global") + place,
                      shared = std::string("shared") + place;
    list(
        global.c_str(), *sums, [](const Site& s) { return s.requests; },
        [&](const Site& s) { out << '[' << s.requests << ", " << s.sectors << ']'; });
    list(
        shared.c_str(), *sums, [](const Site& s) { return s.served; },
        [&](const Site& s) { out << '[' << s.served << ", " << s.passes << ']'; });
  }
  out << '}';
  return out.str();
}

}  // namespace ptx
