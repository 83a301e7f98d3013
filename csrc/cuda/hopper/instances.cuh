// The instances of a kernel, from the lists in hopper_instances.h.
#pragma once

#include <hopper_instances.h>

#include <device/math.cuh>
#include <string>
#include <utility>

namespace fastst {

// Calls f<T>().
// Throws std::invalid_argument, naming the kernel, for other types than those of tensor cores.
template <class F>
void with_half_type(const char* kernel, Dtype dtype, F f) {
  if (dtype == Dtype::f16) return f.template operator()<__half>();
  if (dtype == Dtype::bf16) return f.template operator()<__nv_bfloat16>();
  throw std::invalid_argument(std::string(kernel) + " is for float16 and bfloat16");
}

// Calls f<T, numbers of the tile...>() for the one of Tiles that is wanted.
// Throws std::invalid_argument, naming the kernel, where it is not among them.
template <const auto& Tiles, class F>
void with_instance(const char* kernel, Dtype dtype,
                   const std::remove_cvref_t<decltype(Tiles[0])>& wanted, F f) {
  const auto call = [&]<class T, size_t I, size_t... J>(std::index_sequence<J...>) {
    f.template operator()<T, static_cast<int>(Tiles[I][J])...>();
    return true;
  };
  constexpr auto numbers = std::make_index_sequence<Tiles[0].size()>{};
  bool found = false;
  with_half_type(kernel, dtype, [&]<class T>() {
    [&]<size_t... I>(std::index_sequence<I...>) {
      found = ((Tiles[I] == wanted && call.template operator()<T, I>(numbers)) || ...);
    }(std::make_index_sequence<Tiles.size()>{});
  });
  if (found) return;
  std::string tile;
  for (const int64_t n : wanted) tile += (tile.empty() ? "" : ", ") + std::to_string(n);
  throw std::invalid_argument(std::string(kernel) + " has no tile (" + tile + ")");
}

}  // namespace fastst
