// Between a channels_last image and the matrix of its patches: row (n, oy, ox), column (ky, kx, c), the order in which a
// channels_last weight lies in memory. The matrix product itself is the vendor's.

// The taps kx of one kernel row that fall inside the image, for the kernel at x = left: [first, last).
struct Taps {
  int64_t first, last;
};
FASTGAN_INLINE Taps inside(int64_t left, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t first = left >= 0 ? 0 : ceil_div(-left, dilation);
  const int64_t last = left >= size ? 0 : smaller(taps, (size - 1 - left) / dilation + 1);
  return {first, larger(first, last)};
}

template <class T> void to_patches(const Patches& p, const void* image, void* patches) {
  const int64_t row = p.kw * p.C; // one kernel row of a patch
#pragma omp parallel for collapse(2) schedule(static) if (p.N * p.OH * p.OW * p.kh * row > parallel_threshold)
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t oy = 0; oy < p.OH; ++oy)
      for (int64_t ox = 0; ox < p.OW; ++ox) {
        T* out = static_cast<T*>(patches) + ((n * p.OH + oy) * p.OW + ox) * p.kh * row;
        const int64_t left = ox * p.stride_w - p.pad_w;
        const Taps taps = inside(left, p.dilation_w, p.kw, p.W);
        for (int64_t ky = 0; ky < p.kh; ++ky, out += row) {
          const int64_t y = oy * p.stride_h - p.pad_h + ky * p.dilation_h;
          if (y < 0 || y >= p.H || taps.first == taps.last) {
            __builtin_memset(out, 0, row * sizeof(T));
            continue;
          }
          const T* in = static_cast<const T*>(image) + ((n * p.H + y) * p.W + left) * p.C;
          __builtin_memset(out, 0, taps.first * p.C * sizeof(T));
          __builtin_memset(out + taps.last * p.C, 0, (p.kw - taps.last) * p.C * sizeof(T));
          if (p.dilation_w == 1)
            __builtin_memcpy(out + taps.first * p.C, in + taps.first * p.C, (taps.last - taps.first) * p.C * sizeof(T));
          else
            for (int64_t kx = taps.first; kx < taps.last; ++kx)
              __builtin_memcpy(out + kx * p.C, in + kx * p.dilation_w * p.C, p.C * sizeof(T));
        }
      }
}

// into[:count] += from[:count]. `into` has room for a whole vector behind its end; `from` must not be read beyond `end`.
template <class T> FASTGAN_INLINE void accumulate(acc_t<T>* into, const T* from, int64_t count, const T* end) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(into + i, load(into + i) + load(from + i));
  if (i < count) store(into + i, load(into + i) + load_within(from + i, count - i, end));
}

// Each row of the image is summed by one thread in the order of its patches: the same bits for any number of threads.
template <class T> void from_patches(const Patches& p, const void* patches, void* image) {
  using Acc = acc_t<T>;
  constexpr int W = lanes<Acc>;
  const int64_t row = p.kw * p.C, width = p.W * p.C;
  const T* const end = static_cast<const T*>(patches) + p.N * p.OH * p.OW * p.kh * row;
#pragma omp parallel if (p.N * p.OH * p.OW * p.kh * row > parallel_threshold)
  {
    const Scratch<Acc> sums(width + W);
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < p.N; ++n)
      for (int64_t y = 0; y < p.H; ++y) {
        __builtin_memset(sums.data, 0, (width + W) * sizeof(Acc));
        for (int64_t ky = 0; ky < p.kh; ++ky) {
          const int64_t top = y + p.pad_h - ky * p.dilation_h;
          if (top < 0 || top % p.stride_h || top / p.stride_h >= p.OH) continue;
          const T* in = static_cast<const T*>(patches) + ((n * p.OH + top / p.stride_h) * p.OW * p.kh + ky) * row;
          for (int64_t ox = 0; ox < p.OW; ++ox, in += p.kh * row) {
            const int64_t left = ox * p.stride_w - p.pad_w;
            const Taps taps = inside(left, p.dilation_w, p.kw, p.W);
            if (p.dilation_w == 1)
              accumulate(sums.data + (left + taps.first) * p.C, in + taps.first * p.C, (taps.last - taps.first) * p.C,
                         end);
            else
              for (int64_t kx = taps.first; kx < taps.last; ++kx)
                accumulate(sums.data + (left + kx * p.dilation_w) * p.C, in + kx * p.C, p.C, end);
          }
        }
        T* out = static_cast<T*>(image) + (n * p.H + y) * width;
        for (int64_t i = 0; i < width; i += W) {
          const int k = static_cast<int>(smaller(W, width - i));
          store(out + i, load(sums.data + i, k), k);
        }
      }
  }
}

// ── Few channels that come out ──
// An RGB image, or the score of a critic: the vector lanes hold channels of the input, of which a kernel row of taps has
// kw·C next to each other. The dilation along rows is 1.

constexpr int abreast = 4; // positions that share the loads of a weight

// sums[i][o] += the products of `length` elements at image + i·apart and at weight + o·between.
template <class T, int N, int O>
FASTGAN_INLINE void add_products(vec_t<T> (&sums)[N][O], const T* image, int64_t apart, const T* weight, int64_t between,
                                 int64_t length) {
  constexpr int W = lanes<acc_t<T>>;
  auto add = [&](int64_t at, int n) __attribute__((always_inline)) {
    vec_t<T> w[O];
    for (int o = 0; o < O; ++o) w[o] = load(weight + o * between + at, n);
    for (int i = 0; i < N; ++i) {
      const vec_t<T> x = load(image + i * apart + at, n);
      for (int o = 0; o < O; ++o) sums[i][o] += x * w[o];
    }
  };
  int64_t at = 0;
  for (; at + W <= length; at += W) add(at, W);
  if (at < length) add(at, static_cast<int>(length - at));
}

template <class T, int N, int O>
FASTGAN_INLINE void store_sums(vec_t<T> (&sums)[N][O], const T* bias, T* out) {
  using Acc = acc_t<T>;
  for (int i = 0; i < N; ++i)
    for (int o = 0; o < O; ++o) {
      const double total = sum<Acc>(sums[i][o]);
      out[i * O + o] = static_cast<T>(total + (bias ? bias[o] : 0));
    }
}

template <class T, int O> void to_few(const Patches& p, const T* image, const T* weight, const T* bias, T* positions) {
  const int64_t row = p.kw * p.C, between = p.kh * row, apart = p.stride_w * p.C;
#pragma omp parallel for collapse(2) schedule(static) if (p.N * p.OH * p.OW * between > parallel_threshold)
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t oy = 0; oy < p.OH; ++oy) {
      const int64_t top = oy * p.stride_h - p.pad_h;
      const Taps rows = inside(top, p.dilation_h, p.kh, p.H);
      T* out = positions + (n * p.OH + oy) * p.OW * O;
      // f(ky, the image's row) for every kernel row that lies on the image.
      auto each_row = [&](auto f) __attribute__((always_inline)) {
        for (int64_t ky = rows.first; ky < rows.last; ++ky)
          f(ky, image + (n * p.H + top + ky * p.dilation_h) * p.W * p.C);
      };
      for (int64_t ox = 0; ox < p.OW;) {
        const int64_t left = ox * p.stride_w - p.pad_w;
        if (ox + abreast <= p.OW && left >= 0 && left + (abreast - 1) * p.stride_w + p.kw <= p.W) {
          vec_t<T> sums[abreast][O] = {};
          each_row([&](int64_t ky, const T* line) __attribute__((always_inline)) {
            add_products<T>(sums, line + left * p.C, apart, weight + ky * row, between, row);
          });
          store_sums<T>(sums, bias, out + ox * O);
          ox += abreast;
        } else {
          const Taps taps = inside(left, 1, p.kw, p.W);
          vec_t<T> sums[1][O] = {};
          each_row([&](int64_t ky, const T* line) __attribute__((always_inline)) {
            add_products<T>(sums, line + (left + taps.first) * p.C, apart, weight + ky * row + taps.first * p.C, between,
                            (taps.last - taps.first) * p.C);
          });
          store_sums<T>(sums, bias, out + ox * O);
          ++ox;
        }
      }
    }
}

void image_to_few(const Patches& p, const float* image, const float* weight, int64_t outputs, const float* bias,
                  float* positions) {
  switch (outputs) {
    case 1: return to_few<float, 1>(p, image, weight, bias, positions);
    case 2: return to_few<float, 2>(p, image, weight, bias, positions);
    case 3: return to_few<float, 3>(p, image, weight, bias, positions);
    case 4: return to_few<float, 4>(p, image, weight, bias, positions);
  }
}

void image_to_patches(const Patches& p, const void* image, void* patches) {
  FASTGAN_BY_DTYPE(to_patches, (p, image, patches), p.dtype)
}
void patches_to_image(const Patches& p, const void* patches, void* image) {
  FASTGAN_BY_DTYPE(from_patches, (p, patches, image), p.dtype)
}
