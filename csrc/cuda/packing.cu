// One launch for what the kernels of a call read besides tensors: packed weights, and tables.
#include <device/launch.cuh>
#include <device/tables.cuh>
#include <device/tensor.cuh>

namespace fastst {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxWeights = 4;
constexpr int kPiece = 8, kPieces = 8;  // elements of a row of 64 that a thread has; pieces of it

template <class T>
struct Weight {
  Tensor<const T> from;  // (O, I, kt, kh, kw)
  Global<T> to;
  int columns, column_tiles, chunks;
  int taps_w, taps_h;  // of a column and of a row of the kernel; taps_h: or of time
  Order order;

  __host__ __device__ int64_t threads() const {
    return int64_t(column_tiles) * chunks * columns * kPieces;
  }

  // Element i of the reduction, of one column of the product, through one tap.
  __device__ T read(int64_t column, int64_t i, int tap_h, int tap_w) const {
    int64_t o = column, c = i;
    if (order == Order::mirrored) o = i, c = column, tap_h = taps_h - 1 - tap_h;
    if (order == Order::mirrored) tap_w = taps_w - 1 - tap_w;
    if (order == Order::stem)
      c = i % 4, tap_w = static_cast<int>(i / 4 % 8), tap_h = static_cast<int>(i / 32);
    const bool there = o < from.size[0] && c < from.size[1] &&
                       tap_h < from.size[2] * from.size[3] && tap_w < from.size[4];
    if (!there) return narrow<T>(0.0f);
    const bool time = from.size[2] > 1;
    return from.data[o * from.stride[0] + c * from.stride[1] + tap_h * from.stride[time ? 2 : 3] +
                     tap_w * from.stride[4]];
  }

  // All taps of a piece: neighbours in a contiguous weight.
  __device__ void pack(int64_t index) const {
    const int piece = static_cast<int>(index % kPieces);
    const int64_t row = index / kPieces;  // (tile of columns, chunk, column)
    const int64_t block = row / columns, column = block / chunks * columns + row % columns;
    const int64_t first = (block % chunks * kPieces + piece) * kPiece;
    for (int w = 0; w < taps_w; ++w)
      for (int h = 0; h < taps_h; ++h) {
        Pack<T, kPiece> made;
#pragma unroll
        for (int i = 0; i < kPiece; ++i) made.lane[i] = read(column, first + i, h, w);
        const int64_t place = (block * taps_w + w) * taps_h + h;
        store(to + (place * columns + row % columns) * (kPiece * kPieces) + piece * kPiece, made);
      }
  }
};

template <class T>
struct Parameters {
  Weight<T> weights[kMaxWeights];
  int count;
  Tables<Acc<T>> tables;
  int64_t columns;
};

template <class T>
__global__ void pack_kernel(const __grid_constant__ Parameters<T> p) {
  int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int i = 0; i < p.count; ++i) {
    if (index < p.weights[i].threads()) return p.weights[i].pack(index);
    index -= p.weights[i].threads();
  }
  if (index < p.columns)
    p.tables.write(index, [&](const NormOf<Acc<T>>& norm) { return norm.read(index); });
}

template <class T>
Weight<T> weight_of(const Packing& g) {
  const View& w = g.weight;
  const auto size = [&](int axis) { return narrow_size(w.size[axis]); };
  Weight<T> made{};
  made.from = Tensor<const T>(w), made.to = global<T>(g.packed.data, g.packed.count);
  made.order = g.order, made.columns = narrow_size(g.columns);
  const bool mirrored = g.order == Order::mirrored, stem = g.order == Order::stem;
  made.column_tiles = narrow_size(divide_up(size(mirrored ? 1 : 0), made.columns));
  made.chunks = stem ? 4 : narrow_size(divide_up(size(mirrored ? 0 : 1), kPiece * kPieces));
  made.taps_w = stem ? 1 : size(4), made.taps_h = stem ? 1 : size(2) * size(3);
  if ((w.size[2] > 1 && w.size[3] * w.size[4] > 1) ||
      made.threads() * kPiece * made.taps_w * made.taps_h != g.packed.count)
    throw std::invalid_argument("pack needs room for a weight of taps in time or in the plane, " +
                                shape(w) + ", not " + std::to_string(g.packed.count) + " elements");
  return made;
}

}  // namespace

void pack(Dtype dtype, const std::vector<Packing>& weights, const std::vector<Table>& tables,
          Stream stream) {
  if (weights.size() > size_t(kMaxWeights))
    throw std::invalid_argument("pack takes at most 4 weights");
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    Parameters<T> p{};
    int64_t threads = 0;
    for (const Packing& g : weights) {
      p.weights[p.count] = weight_of<T>(g);
      threads += p.weights[p.count++].threads();
    }
    p.tables = Tables<Acc<T>>(tables), p.columns = p.tables.columns();
    threads += p.columns;
    launch(
        "pack", pack_kernel<T>, dim3(divide_up(threads, kThreads)), dim3(kThreads), 0, stream,
        std::to_string(weights.size()) + " weights, " + std::to_string(tables.size()) + " tables",
        p);
  });
}

}  // namespace fastst
