// Per-channel reductions and the small per-channel arithmetic of batch norm.
//
// Deterministic: each block reduces a chunk of positions for 32 channels, and a second kernel adds
// the partials of the chunks in a fixed order.
#include <algorithm>
#include <device/launch.cuh>
#include <device/source.cuh>
#include <device/tables.cuh>

namespace fastst {
namespace {

constexpr int kColumns = 32, kLanes = 8;  // a block: channels by positions
constexpr int kRowLanes = 32;             // or by rows of partials

template <class A>
struct Moments {  // of a set of values; merged by Chan's formula
  A count = A(0), mean = A(0), m2 = A(0);

  __device__ void add(A value) {
    count += A(1);
    const A delta = value - mean;
    mean += delta / count;
    m2 += delta * (value - mean);
  }
  __device__ void merge(const Moments& other) {
    const A total = count + other.count;
    if (other.count == A(0)) return;
    const A delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

template <class A>
struct Sums {
  A first = A(0), second = A(0);

  __device__ void merge(const Sums& other) { first += other.first, second += other.second; }
};

// Merges the values of all lanes of a column, for all of them. All threads of the block call it.
template <int Lanes = kLanes, class V>
__device__ V merge_lanes(V value) {
  const Shared<V> all = shared<V>(0);  // (Lanes, kColumns)
  const int lane = static_cast<int>(threadIdx.y), own = lane * kColumns + int(threadIdx.x);
  all[own] = value;
  for (int step = Lanes / 2; step > 0; step /= 2) {
    sync_block();
    if (lane < step) {
      const V other = all[own + step * kColumns];
      value.merge(other);
      all[own] = value;
    }
  }
  sync_block();
  value = all[int(threadIdx.x)];
  sync_block();  // it may be called again
  return value;
}

__device__ inline int64_t column() { return int64_t(blockIdx.x) * kColumns + threadIdx.x; }

// The channels and the positions of a block, of sets of as many positions each, of which every one
// is cut into gridDim.y chunks.
struct Part {
  int64_t set, c, begin, end;

  __device__ Part(int64_t positions, int64_t sets, int64_t chunk) {
    const int64_t blocks = gridDim.x / sets, length = positions / sets;
    set = blockIdx.x / blocks, c = blockIdx.x % blocks * kColumns + threadIdx.x;
    begin = blockIdx.y * chunk, end = begin + chunk < length ? begin + chunk : length;
    begin += set * length, end += set * length;
  }
  // Of (splits, rows, sets, channels).
  __device__ int64_t at(int64_t row, int64_t rows, int64_t sets, int64_t channels) const {
    return ((blockIdx.y * rows + row) * sets + set) * channels + c;
  }
};

template <class T>
__global__ void statistics_kernel(const __grid_constant__ Tensor<const T> u,
                                  Global<Acc<T>> partials, int64_t sets, int64_t chunk) {
  const int64_t channels = u.size[1];
  const Part part(u.positions(), sets, chunk);
  const int64_t c = part.c;
  Moments<Acc<T>> moments;
  if (c < channels)
    for (int64_t i = part.begin + threadIdx.y; i < part.end; i += kLanes) {
      const Position at(i, u);
      moments.add(widen(u.data[u.offset(at.n, at.t, at.h, at.w) + c * u.stride[1]]));
    }
  moments = merge_lanes(moments);
  if (threadIdx.y == 0 && c < channels) {
    partials[part.at(0, 3, sets, channels)] = moments.count;
    partials[part.at(1, 3, sets, channels)] = moments.mean;
    partials[part.at(2, 3, sets, channels)] = moments.m2;
  }
}

template <class T>
__global__ void sums_kernel(const __grid_constant__ Reader<T> s,
                            const __grid_constant__ Reader<T> u, Global<Acc<T>> partials,
                            int64_t sets, int64_t chunk) {
  using A = Acc<T>;
  const int64_t channels = s.a.size[1];
  const Part part(s.a.positions(), sets, chunk);
  Sums<A> sums;
  if (part.c < channels)
    for (int64_t i = part.begin + threadIdx.y; i < part.end; i += kLanes) {
      const Position at(i, s.a);
      const A value = s(s.place(at.n, at.t, at.h, at.w), part.c);
      sums.first += value;
      if (u.a.data) sums.second += value * u.centred(u.place(at.n, at.t, at.h, at.w), part.c);
    }
  sums = merge_lanes(sums);
  if (threadIdx.y == 0 && part.c < channels) {
    partials[part.at(0, 2, sets, channels)] = sums.first;
    partials[part.at(1, 2, sets, channels)] = sums.second;
  }
}

constexpr int kThreads = 256;  // of the kernels below, with a position or an element each
constexpr int kChain = 32;     // terms added up before they join the total: shorter rounding chains

// Σ term(c) over the channels.
template <class A, class F>
__device__ A over_channels(int64_t channels, F term) {
  A total(0);
  for (int64_t c = 0; c < channels;) {
    A sum(0);
    for (const int64_t end = c + kChain < channels ? c + kChain : channels; c < end; ++c)
      sum += term(c);
    total += sum;
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    position_moments_kernel(const __grid_constant__ Tensor<const T> u, Global<Acc<T>> mean,
                            Global<Acc<T>> var) {
  using A = Acc<T>;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t positions = u.positions(), channels = u.size[1];
  if (index >= positions) return;
  const Position at(index, u);
  const int64_t first = u.offset(at.n, at.t, at.h, at.w);
  const auto value = [&](int64_t c) { return widen(u.data[first + c * u.stride[1]]); };
  const A centre = mean ? over_channels<A>(channels, value) / A(channels) : A(0);
  const auto square = [&](int64_t c) { return (value(c) - centre) * (value(c) - centre); };
  if (mean) mean[index] = centre;
  var[index] = over_channels<A>(channels, square) / A(channels);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    position_sums_kernel(const __grid_constant__ Tensor<const T> dv,
                         const __grid_constant__ Reader<T> u, bool centred, Global<Acc<T>> out) {
  using A = Acc<T>;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t positions = dv.positions(), channels = dv.size[1];
  if (index >= positions) return;
  const Position at(index, dv);
  const int64_t first = dv.offset(at.n, at.t, at.h, at.w);
  const auto place = u.place(at.n, at.t, at.h, at.w);
  const auto g = [&](int64_t c) {
    return u.scale(place, c) * widen(dv.data[first + c * dv.stride[1]]);
  };
  const auto along = [&](int64_t c) { return g(c) * u.centred(place, c); };
  out[index] = centred ? over_channels<A>(channels, g) / A(channels) : A(0);
  out[positions + index] = over_channels<A>(channels, along) / A(channels);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    write_source_kernel(const __grid_constant__ Reader<T> s,
                        const __grid_constant__ Tensor<T> out) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channels = out.size[1], c = index % channels;
  if (index >= out.positions() * channels) return;
  const Position at(index / channels, out);
  out.data[out.offset(at.n, at.t, at.h, at.w) + c * out.stride[1]] =
      narrow<T>(s(s.place(at.n, at.t, at.h, at.w), c));
}

constexpr int kMaxSums = 2;

template <class A>
struct RowSums {
  struct Each {
    Global<const A> partials;
    Global<A> out;
    int64_t rows, columns, blocks;
  };
  Each each[kMaxSums];
};

template <class A>
__global__ void sum_rows_kernel(const __grid_constant__ RowSums<A> sums) {
  const bool second = blockIdx.x >= sums.each[0].blocks;
  const auto& of = sums.each[second];
  const int64_t block = int64_t(blockIdx.x) - (second ? sums.each[0].blocks : 0);
  const int64_t c = block * kColumns + threadIdx.x;
  Sums<A> sum;
  if (c < of.columns)
    for (int64_t r = threadIdx.y; r < of.rows; r += kLanes)
      sum.first += of.partials[r * of.columns + c];
  sum = merge_lanes(sum);
  if (threadIdx.y == 0 && c < of.columns) of.out[c] = sum.first;
}

// Count, mean and squares of a lane's rows of one column, kAhead of them at a time, so that a
// batch waits for memory once. Rows beyond the last count nothing.
template <class A>
class RowBatches {
  static constexpr int kAhead = 8;

 public:
  __device__ RowBatches(Global<const A> partials, int64_t rows, int64_t channels)
      : partials_(partials), rows_(column() < channels ? rows : 0), channels_(channels) {}

  template <class F>
  __device__ void each(F f) const {
    for (int64_t first = threadIdx.y; first < rows_; first += kAhead * kRowLanes) {
      A count[kAhead], mean[kAhead], square[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t r = first + i * kRowLanes, at = r * 3 * channels_ + column();
        const bool there = r < rows_;
        count[i] = there ? partials_[at] : A(0);
        mean[i] = there ? partials_[at + channels_] : A(0);
        square[i] = there ? partials_[at + 2 * channels_] : A(0);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) f(count[i], mean[i], square[i]);
    }
  }

 private:
  Global<const A> partials_;
  int64_t rows_, channels_;
};

// The mean first, then the squares around it: merged one by one, by Chan's formula, each row would
// wait for the division of the one before. An error of the mean enters by its square. One block to
// a multiprocessor, or ptxas saves registers and waits for every other load.
template <class A>
__global__ void __launch_bounds__(kColumns* kRowLanes, 1)
    combine_statistics_kernel(Global<const A> partials, Global<A> mean, Global<A> var, int64_t rows,
                              int64_t channels, const __grid_constant__ Tables<A> tables) {
  const RowBatches<A> all(partials, rows, channels);
  Sums<A> sums;
  all.each([&](A n, A row, A) { sums.first += n, sums.second += n * row; });
  sums = merge_lanes<kRowLanes>(sums);
  const A count = sums.first, centre = sums.second / count;
  Sums<A> squares;
  all.each([&](A n, A row, A m2) { squares.first += m2 + n * (row - centre) * (row - centre); });
  squares = merge_lanes<kRowLanes>(squares);
  if (threadIdx.y != 0) return;
  const A variance = squares.first / count;
  if (column() < channels) mean[column()] = centre, var[column()] = variance;
  tables.write(column(),
               [&](const NormOf<A>& norm) { return norm.read(column(), centre, variance); });
}

// p = −s·rstd²·Σdv(u − mean)/n and q = −s·Σdv/n. Rows as in RowBatches, of two sums each.
template <class A>
__global__ void __launch_bounds__(kColumns* kRowLanes, 1)
    norm_gradient_kernel(Global<const A> partials, int64_t rows, A count, bool batch,
                         Global<A> dgamma, Global<A> dbeta, Global<A> dbias, int64_t channels,
                         const __grid_constant__ NormOf<A> norm,
                         const __grid_constant__ Tables<A> tables) {
  constexpr int kAhead = 8;
  const int64_t c = column();
  Sums<A> sums;
  for (int64_t first = threadIdx.y; c < channels && first < rows; first += kAhead * kRowLanes) {
    Sums<A> row[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t r = first + i * kRowLanes;
      if (r < rows) row[i] = {partials[r * 2 * channels + c], partials[(r * 2 + 1) * channels + c]};
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sums.merge(row[i]);
  }
  sums = merge_lanes<kRowLanes>(sums);
  if (threadIdx.y != 0) return;
  OfChannel<A> of;
  if (c < channels) {
    of = norm.read(c);
    const A rstd = norm.normalises ? A(1) / sqrt(norm.var.read(c, A(0)) + norm.eps) : A(1);
    if (dgamma) dgamma[c] = rstd * sums.second;
    if (dbeta) dbeta[c] = sums.first;
    if (dbias) dbias[c] = batch ? A(0) : of.scale * sums.first;  // the mean takes its own sum away
    if (batch) of.p = -of.scale * rstd * rstd * sums.second / count;
    if (batch) of.q = -of.scale * sums.first / count;
  }
  tables.write(c, [&](const NormOf<A>&) { return of; });
}

std::string channels_text(int64_t channels) { return std::to_string(channels) + " channels"; }

template <class A>
Global<const A> in(Array a) {
  return global<const A>(a.data, a.count);
}

template <class A>
Global<A> out(Array a) {
  return global<A>(a.data, a.count);
}

// Calls f with a value of the accumulation type.
template <class F>
void with_accumulator(Dtype dtype, F f) {
  if (dtype == Dtype::f64) return f(double{});
  f(float{});
}

}  // namespace

void channel_statistics(Dtype dtype, const View& u, Array partials, int64_t splits, int64_t sets,
                        Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t length = u.size[0] * u.size[2] * u.size[3] * u.size[4] / sets;
    launch("channel_statistics", statistics_kernel<T>,
           dim3(divide_up(u.size[1], kColumns) * sets, splits), dim3(kColumns, kLanes),
           sizeof(Moments<Acc<T>>) * kColumns * kLanes, stream, shape(u), Tensor<const T>(u),
           out<Acc<T>>(partials), sets, divide_up(length, splits));
  });
}

void channel_sums(Dtype dtype, const Source& s, const std::optional<Source>& u, Array partials,
                  int64_t splits, int64_t sets, Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t length = s.a.size[0] * s.a.size[2] * s.a.size[3] * s.a.size[4] / sets;
    launch("channel_sums", sums_kernel<T>, dim3(divide_up(s.a.size[1], kColumns) * sets, splits),
           dim3(kColumns, kLanes), sizeof(Sums<Acc<T>>) * kColumns * kLanes, stream, shape(s.a),
           Reader<T>(s), u ? Reader<T>(*u) : Reader<T>(), out<Acc<T>>(partials), sets,
           divide_up(length, splits));
  });
}

void position_moments(Dtype dtype, const View& u, Array mean, Array var, Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch("position_moments", position_moments_kernel<T>,
           dim3(divide_up(u.count() / u.size[1], kThreads)), dim3(kThreads), 0, stream, shape(u),
           Tensor<const T>(u), out<Acc<T>>(mean), out<Acc<T>>(var));
  });
}

void position_sums(Dtype dtype, const View& dv, const Source& u, bool centred, Array found,
                   Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch("position_sums", position_sums_kernel<T>,
           dim3(divide_up(dv.count() / dv.size[1], kThreads)), dim3(kThreads), 0, stream, shape(dv),
           Tensor<const T>(dv), Reader<T>(u), centred, out<Acc<T>>(found));
  });
}

void write_source(Dtype dtype, const Source& s, const View& to, Stream stream) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch("write_source", write_source_kernel<T>, dim3(divide_up(to.count(), kThreads)),
           dim3(kThreads), 0, stream, shape(to), Reader<T>(s), Tensor<T>(to));
  });
}

void sum_rows(Dtype dtype, const std::vector<RowSum>& wanted, Stream stream) {
  if (wanted.empty() || wanted.size() > size_t(kMaxSums))
    throw std::invalid_argument("sum_rows needs 1 or 2 sums");
  with_accumulator(dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    RowSums<A> sums{};
    int64_t blocks = 0;
    std::string what;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const RowSum& w = wanted[i];
      const int64_t own = divide_up(w.out.count, kColumns);
      sums.each[i] = {in<A>(w.partials), out<A>(w.out), w.rows, w.out.count, own};
      blocks += own;
      what += std::to_string(w.rows) + " rows of " + std::to_string(w.out.count) + " ";
    }
    launch("sum_rows", sum_rows_kernel<A>, dim3(blocks), dim3(kColumns, kLanes),
           sizeof(Sums<A>) * kColumns * kLanes, stream, what, sums);
  });
}

void combine_statistics(Dtype dtype, Array partials, Array mean, Array var, int64_t splits,
                        const std::vector<Table>& tables, Stream stream) {
  with_accumulator(dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    const Tables<A> made(tables);
    launch("combine_statistics", combine_statistics_kernel<A>,
           dim3(divide_up(std::max(mean.count, made.columns()), kColumns)),
           dim3(kColumns, kRowLanes), sizeof(Sums<A>) * kColumns * kRowLanes, stream,
           channels_text(mean.count), in<A>(partials), out<A>(mean), out<A>(var), splits,
           mean.count, made);
  });
}

void norm_gradient(Dtype dtype, const Norm& norm, Array partials, int64_t rows, double count,
                   bool batch, const std::array<Array, 3>& gradients,
                   const std::vector<Table>& tables, Stream stream) {
  with_accumulator(dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    const Tables<A> made(tables);
    launch("norm_gradient", norm_gradient_kernel<A>,
           dim3(divide_up(std::max(norm.channels, made.columns()), kColumns)),
           dim3(kColumns, kRowLanes), sizeof(Sums<A>) * kColumns * kRowLanes, stream,
           channels_text(norm.channels), in<A>(partials), rows, A(count), batch,
           out<A>(gradients[0]), out<A>(gradients[1]), out<A>(gradients[2]), norm.channels,
           NormOf<A>(norm), made);
  });
}

}  // namespace fastst
