// Vectors of the accumulation type, and how the four element types are loaded into them and stored from them.
// GCC and Clang vector extensions: one source for every instruction set, and no intrinsic.

#define FASTGAN_INLINE static inline __attribute__((always_inline))

template <class T, int Bytes> struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
using f32v = VectorOf<float, FASTGAN_VECTOR_BYTES>::type;
using i32v = VectorOf<int32_t, FASTGAN_VECTOR_BYTES>::type;
using u32v = VectorOf<uint32_t, FASTGAN_VECTOR_BYTES>::type;
using u16v = VectorOf<uint16_t, FASTGAN_VECTOR_BYTES / 2>::type;
using f64v = VectorOf<double, FASTGAN_VECTOR_BYTES>::type;
using i64v = VectorOf<int64_t, FASTGAN_VECTOR_BYTES>::type;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T> struct Element {
  using acc = float;
};
template <> struct Element<double> {
  using acc = double;
};
template <class T> using acc_t = typename Element<T>::acc;

template <class Acc> struct Lanes;
template <> struct Lanes<float> {
  using vec = f32v;
  using mask = i32v;
};
template <> struct Lanes<double> {
  using vec = f64v;
  using mask = i64v;
};
template <class T> using vec_t = typename Lanes<acc_t<T>>::vec;
template <class Acc> constexpr int lanes = FASTGAN_VECTOR_BYTES / sizeof(Acc);

template <class To, class From> FASTGAN_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class V, class T> FASTGAN_INLINE V read(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// As the element type, which cannot lie over pointers and sizes: after a memcpy the compiler reads all of these again.
template <class V, class T> FASTGAN_INLINE void write(T* p, V v) {
  typedef V unaligned __attribute__((aligned(sizeof(T))));
  *reinterpret_cast<unaligned*>(p) = v;
}
FASTGAN_INLINE u32v read_u16(const void* p) {
  const u16v half = read<u16v>(static_cast<const uint16_t*>(p));
#if defined(__clang__) || FASTGAN_VECTOR_BYTES == 16
  return __builtin_convertvector(half, u32v);
#elif FASTGAN_VECTOR_BYTES == 32 // GCC converts in two halves
  return bits_as<u32v>(__builtin_ia32_pmovzxwd256(bits_as<VectorOf<int16_t, 16>::type>(half)));
#else
  return bits_as<u32v>(__builtin_ia32_pmovzxwd512_mask(bits_as<VectorOf<int16_t, 32>::type>(half), i32v{}, 0xffff));
#endif
}
FASTGAN_INLINE void write_u16(void* p, u32v bits) {
  write(static_cast<uint16_t*>(p), __builtin_convertvector(bits, u16v));
}

FASTGAN_INLINE f32v load(const float* p) { return read<f32v>(p); }
FASTGAN_INLINE f64v load(const double* p) { return read<f64v>(p); }
// From 16 bits in the low half of each lane, and back; the type is that of the first argument.
FASTGAN_INLINE f32v widen(bfloat16, u32v half) { return bits_as<f32v>(half << 16); }
FASTGAN_INLINE f32v widen(float16, u32v half) {
  const u32v magnitude = half & 0x7fffu;
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  u32v bits = bits_as<u32v>(bits_as<f32v>(magnitude << 13) * 0x1p112f);
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return bits_as<f32v>(bits | ((half & 0x8000u) << 16));
}
FASTGAN_INLINE f32v load(const bfloat16* p) { return widen(bfloat16{}, read_u16(p)); }
FASTGAN_INLINE f32v load(const float16* p) { return widen(float16{}, read_u16(p)); }

FASTGAN_INLINE void store(float* p, f32v v) { write(p, v); }
FASTGAN_INLINE void store(double* p, f64v v) { write(p, v); }
// Both round to nearest, ties to even.
FASTGAN_INLINE u32v narrow(bfloat16, f32v v) {
  const u32v bits = bits_as<u32v>(v);
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? (bits >> 16) | 0x40u : rounded;
}
FASTGAN_INLINE u32v narrow(float16, f32v v) {
  const u32v bits = bits_as<u32v>(v), magnitude = bits & 0x7fffffffu;
  const u32v normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 0.5 leaves the subnormal's bits, rounded, in the low end of the mantissa.
  const u32v subnormal = bits_as<u32v>(bits_as<f32v>(magnitude) + 0.5f) - 0x3f000000u;
  const u32v special = magnitude > 0x7f800000u ? u32v{} + 0x7e00u : u32v{} + 0x7c00u;
  const u32v finite = magnitude < 0x38800000u ? subnormal : normal;
  return (magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u);
}
FASTGAN_INLINE void store(bfloat16* p, f32v v) { write_u16(p, narrow(bfloat16{}, v)); }
FASTGAN_INLINE void store(float16* p, f32v v) { write_u16(p, narrow(float16{}, v)); }

// The first n < lanes elements; the other lanes are zero.
template <class T> FASTGAN_INLINE vec_t<T> load_part(const T* p, int n) {
  T whole[lanes<acc_t<T>>] = {};
  __builtin_memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T> FASTGAN_INLINE void store_part(T* p, vec_t<T> v, int n) {
  T whole[lanes<acc_t<T>>];
  store(whole, v);
  __builtin_memcpy(p, whole, n * sizeof(T));
}
template <class T> FASTGAN_INLINE vec_t<T> load(const T* p, int n) {
  return n == lanes<acc_t<T>> ? load(p) : load_part(p, n);
}
template <class T> FASTGAN_INLINE void store(T* p, vec_t<T> v, int n) {
  if (n == lanes<acc_t<T>>)
    store(p, v);
  else
    store_part(p, v, n);
}

// Of what is read and written together: above, the L3 holds too little of it for what comes next. Timed with an operation that
// reads the output, on an AMD EPYC, writing past the caches lost at 34 MB and gained at 47.
template <class T> bool exceeds_caches(int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) > 40 << 20; }
// Past the caches, into which a line that is only written need not be read before. After the last of these, and before
// another thread reads what they wrote, comes finish_streams.
template <class T> FASTGAN_INLINE void store_or_stream(T* p, vec_t<T> v, bool streams) {
#if defined(__x86_64__) && !defined(__clang__)
  if constexpr (sizeof(T) == sizeof(float))
    if (streams && reinterpret_cast<uintptr_t>(p) % sizeof v == 0) {
#if FASTGAN_VECTOR_BYTES == 64
      return __builtin_ia32_movntps512(p, v);
#elif FASTGAN_VECTOR_BYTES == 32
      return __builtin_ia32_movntps256(p, v);
#else
      return __builtin_ia32_movntps(p, v);
#endif
    }
#endif
  store(p, v);
}
template <class T> FASTGAN_INLINE void store_or_stream(T* p, vec_t<T> v, int n, bool streams) {
  if (n == lanes<acc_t<T>>)
    store_or_stream(p, v, streams);
  else
    store_part(p, v, n);
}
FASTGAN_INLINE void finish_streams() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

template <class Acc> FASTGAN_INLINE typename Lanes<Acc>::vec broadcast(Acc value) {
  return value - typename Lanes<Acc>::vec{}; // a sum with zero would have to make +0 of -0
}
// All ones in the first n lanes.
template <class Acc> FASTGAN_INLINE typename Lanes<Acc>::mask first_lanes(int n) {
  typename Lanes<Acc>::mask index;
  for (int i = 0; i < lanes<Acc>; ++i) index[i] = i;
  return index < n;
}
// v where the mask is set, else zero.
template <class V, class M> FASTGAN_INLINE V keep(M mask, V v) { return bits_as<V>(mask & bits_as<M>(v)); }

// The first n elements, other lanes zero, where what lies before `end` may be read.
template <class T> FASTGAN_INLINE vec_t<T> load_within(const T* p, int64_t n, const T* end) {
  constexpr int W = lanes<acc_t<T>>;
  if (n >= W) return load(p);
  return p + W <= end ? keep(first_lanes<acc_t<T>>(static_cast<int>(n)), load(p)) : load_part(p, static_cast<int>(n));
}

// The lanes of a pair by turns, a0 b0 a1 b1 …, and back.
template <class Acc> struct Pair {
  typename Lanes<Acc>::vec a, b;
};
template <class Acc> FASTGAN_INLINE Pair<Acc> shuffle(const Pair<Acc>& p, typename Lanes<Acc>::mask a, typename Lanes<Acc>::mask b) {
#if defined(__clang__)
  Pair<Acc> to;
  for (int i = 0; i < lanes<Acc>; ++i) {
    to.a[i] = a[i] < lanes<Acc> ? p.a[a[i]] : p.b[a[i] - lanes<Acc>];
    to.b[i] = b[i] < lanes<Acc> ? p.a[b[i]] : p.b[b[i] - lanes<Acc>];
  }
  return to;
#else
  return {__builtin_shuffle(p.a, p.b, a), __builtin_shuffle(p.a, p.b, b)};
#endif
}
template <class Acc> FASTGAN_INLINE Pair<Acc> interleave(const Pair<Acc>& p) {
  typename Lanes<Acc>::mask a;
  for (int i = 0; i < lanes<Acc>; ++i) a[i] = i / 2 + i % 2 * lanes<Acc>;
  return shuffle(p, a, a + lanes<Acc> / 2);
}
template <class Acc> FASTGAN_INLINE Pair<Acc> deinterleave(const Pair<Acc>& p) {
  typename Lanes<Acc>::mask a;
  for (int i = 0; i < lanes<Acc>; ++i) a[i] = 2 * i;
  return shuffle(p, a, a + 1);
}

// Two vectors of elements that lie in memory by turns. Two of 16 bits are one lane.
template <class T> FASTGAN_INLINE Pair<acc_t<T>> load_by_turns(const T* p) {
  constexpr int W = lanes<acc_t<T>>;
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return deinterleave<acc_t<T>>({load(p), load(p + W)});
  } else {
    const u32v both = read<u32v>(p);
    return {widen(T{}, both & 0xffffu), widen(T{}, both >> 16)};
  }
}
template <class T> FASTGAN_INLINE void store_by_turns(T* p, const Pair<acc_t<T>>& pair) {
  constexpr int W = lanes<acc_t<T>>;
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    const Pair<acc_t<T>> both = interleave<acc_t<T>>(pair);
    store(p, both.a);
    store(p + W, both.b);
  } else {
    const u32v both = narrow(T{}, pair.a) | (narrow(T{}, pair.b) << 16);
    __builtin_memcpy(p, &both, sizeof both);
  }
}
// The first n elements of each; the other lanes are zero.
template <class T> FASTGAN_INLINE Pair<acc_t<T>> load_by_turns(const T* p, int n) {
  constexpr int W = lanes<acc_t<T>>;
  if (n == W) return load_by_turns(p);
  T whole[2 * W] = {};
  __builtin_memcpy(whole, p, 2 * n * sizeof(T));
  return load_by_turns(whole);
}
template <class T> FASTGAN_INLINE void store_by_turns(T* p, const Pair<acc_t<T>>& pair, int n) {
  constexpr int W = lanes<acc_t<T>>;
  if (n == W) return store_by_turns(p, pair);
  T whole[2 * W];
  store_by_turns(whole, pair);
  __builtin_memcpy(p, whole, 2 * n * sizeof(T));
}

// A double for each lane of a vector of Acc. (GCC keeps a vector of so many bytes in memory where a loop goes on with it.)
template <class Acc> struct Doubles {
  static constexpr int L = lanes<double>, parts = lanes<Acc> / L;
  f64v part[parts];

  static inline __attribute__((always_inline)) Doubles of(typename Lanes<Acc>::vec v) {
    const auto wide = __builtin_convertvector(v, typename VectorOf<double, parts * sizeof(f64v)>::type);
    Doubles all;
    __builtin_memcpy(&all, &wide, sizeof all);
    return all;
  }
  double operator[](int64_t i) const { return part[i / L][i % L]; }
  inline __attribute__((always_inline)) void operator+=(const Doubles& other) {
    for (int i = 0; i < parts; ++i) part[i] += other.part[i];
  }
  inline __attribute__((always_inline)) void operator*=(const Doubles& other) {
    for (int i = 0; i < parts; ++i) part[i] *= other.part[i];
  }
  inline __attribute__((always_inline)) void operator*=(double factor) {
    for (int i = 0; i < parts; ++i) part[i] *= factor;
  }
};
// The sum of the lanes of each of K. They are added up side by side: one alone would leave most lanes idle.
template <class Acc, int K> FASTGAN_INLINE void sum_lanes(const Doubles<Acc> (&vectors)[K], double (&sums)[K]) {
  constexpr int L = lanes<double>;
  for (int first = 0; first < K; first += L) {
    f64v totals[L] = {};
    for (int i = 0; i < L && first + i < K; ++i) {
      const Doubles<Acc>& vector = vectors[first + i];
      totals[i] = vector.part[0];
      for (int part = 1; part < vector.parts; ++part) totals[i] += vector.part[part];
    }
    for (int left = L / 2; left > 0; left /= 2)
      for (int i = 0; i < left; ++i) {
        const Pair<double> halves = deinterleave<double>({totals[2 * i], totals[2 * i + 1]});
        totals[i] = halves.a + halves.b;
      }
    __builtin_memcpy(&sums[first], &totals[0], (K - first < L ? K - first : L) * sizeof(double));
  }
}
template <class Acc> FASTGAN_INLINE double sum(const Doubles<Acc>& vector) {
  double total[1];
  sum_lanes<Acc, 1>({vector}, total);
  return total[0];
}
template <class Acc> FASTGAN_INLINE double sum(typename Lanes<Acc>::vec vector) { return sum<Acc>(Doubles<Acc>::of(vector)); }

FASTGAN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTGAN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTGAN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory, at the start of a cache line. (std::vector would be instantiated once for all instruction sets.)
template <class T> struct Scratch {
  static constexpr auto line = std::align_val_t(64);
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(::operator new(larger(count, 1) * sizeof(T), line))) {}
  ~Scratch() { ::operator delete(data, line); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
};

// This thread's part of `count`.
struct Share {
  int64_t first, last;
  explicit Share(int64_t count)
      : first(count * omp_get_thread_num() / omp_get_num_threads()),
        last(count * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}
};

// Starting a parallel region costs microseconds: below this many elements one thread is faster.
constexpr int64_t parallel_threshold = 32768;

#define FASTGAN_BY_DTYPE(function, arguments, dtype)                         \
  switch (dtype) {                                                           \
    case DType::float32: return function<float> arguments;                   \
    case DType::float64: return function<double> arguments;                  \
    case DType::bfloat16: return function<bfloat16> arguments;               \
    case DType::float16: return function<float16> arguments;                 \
  }
