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

void image_to_patches(const Patches& p, const void* image, void* patches) {
  FASTGAN_BY_DTYPE(to_patches, (p, image, patches), p.dtype)
}
void patches_to_image(const Patches& p, const void* patches, void* image) {
  FASTGAN_BY_DTYPE(from_patches, (p, patches, image), p.dtype)
}
