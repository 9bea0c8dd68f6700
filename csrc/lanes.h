// Sixteen numbers on which the usual operators work lane by lane.
//
// They lie in as many vectors of the compiler (GCC, Clang) as make up sixteen lanes in the processor's
// registers: one with AVX-512, two with AVX2, four with NEON. (What is wider than a register lives in memory: a
// resize took eight times as long.) Nor are multiply and add contracted (native.py): so the order of every sum,
// and with it every bit of a result, is the same on all of them.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace fastmim {

constexpr int64_t LANES = 16;
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;  // 32-bit lanes of a register
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
constexpr int64_t PARTS = LANES / WIDTH;

#define FASTMIM_LANEWISE(result, op)                                                        \
  friend inline result operator op(const Lanes& a, const Lanes& b) {                        \
    result out;                                                                             \
    for (int64_t i = 0; i < PARTS; ++i) out.part[i] = a.part[i] op b.part[i];               \
    return out;                                                                             \
  }

template <typename T>
struct Lanes {
  typedef T Part __attribute__((vector_size(WIDTH * sizeof(T))));

  Lanes() = default;  // zeros
  Lanes(T x) {        // the same in all
    for (Part& p : part) p = Part{} + x;
  }

  T operator[](int64_t lane) const { return part[lane / WIDTH][lane % WIDTH]; }
  Lanes& operator+=(const Lanes& other) { return *this = *this + other; }
  Lanes operator-() const {
    Lanes out;
    for (int64_t i = 0; i < PARTS; ++i) out.part[i] = -part[i];
    return out;
  }
  FASTMIM_LANEWISE(Lanes, +)
  FASTMIM_LANEWISE(Lanes, -)
  FASTMIM_LANEWISE(Lanes, *)
  FASTMIM_LANEWISE(Lanes, /)
  FASTMIM_LANEWISE(Lanes, &)
  FASTMIM_LANEWISE(Lanes, |)
  FASTMIM_LANEWISE(Lanes, <<)
  FASTMIM_LANEWISE(Lanes, >>)
  FASTMIM_LANEWISE(Lanes<int32_t>, <)  // -1 where it is so, else 0
  FASTMIM_LANEWISE(Lanes<int32_t>, >)
  FASTMIM_LANEWISE(Lanes<int32_t>, <=)
  FASTMIM_LANEWISE(Lanes<int32_t>, >=)
  FASTMIM_LANEWISE(Lanes<int32_t>, ==)

  Part part[PARTS]{};
};

#undef FASTMIM_LANEWISE

typedef Lanes<float> Floats;
typedef Lanes<int32_t> Ints;
typedef Lanes<uint32_t> Words;
typedef Lanes<uint16_t> Shorts;

template <typename T>
inline Lanes<T> choose(const Ints& where, const Lanes<T>& yes, const Lanes<T>& no) {
  Lanes<T> out;
  for (int64_t i = 0; i < PARTS; ++i) out.part[i] = where.part[i] ? yes.part[i] : no.part[i];
  return out;
}

// The same numbers, as far as T holds them: fractions are cut off.
template <typename T, typename F>
inline Lanes<T> convert(const Lanes<F>& v) {
  Lanes<T> out;
  for (int64_t i = 0; i < PARTS; ++i) out.part[i] = __builtin_convertvector(v.part[i], typename Lanes<T>::Part);
  return out;
}

// The same bits.
template <typename T, typename F>
inline Lanes<T> bits(const Lanes<F>& v) {
  static_assert(sizeof(T) == sizeof(F));
  Lanes<T> out;
  for (int64_t i = 0; i < PARTS; ++i) out.part[i] = (typename Lanes<T>::Part)v.part[i];
  return out;
}

// Sixteen values of any alignment.
template <typename T>
inline Lanes<T> read(const T* at) {
  Lanes<T> v;
  for (int64_t i = 0; i < PARTS; ++i) std::memcpy(&v.part[i], at + i * WIDTH, sizeof(v.part[i]));
  return v;
}

template <typename T>
inline void write(T* at, const Lanes<T>& v) {
  for (int64_t i = 0; i < PARTS; ++i) std::memcpy(at + i * WIDTH, &v.part[i], sizeof(v.part[i]));
}

inline Ints read_bytes(const uint8_t* at) {
  Ints v;
#if defined(__AVX512F__)  // the compiler needs seven instructions for it
  v.part[0] = (Ints::Part)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__AVX2__)
  for (int64_t i = 0; i < PARTS; ++i)
    v.part[i] = (Ints::Part)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + i * WIDTH)));
#else
  for (int64_t i = 0; i < LANES; ++i) v.part[i / WIDTH][i % WIDTH] = at[i];
#endif
  return v;
}

// What lies outside of 0 to 255 is cut off to it; it lies between -2**15 and 2**15.
inline void write_bytes(uint8_t* at, const Ints& v) {
#if defined(__AVX512F__)
  const __m512i positive = _mm512_max_epi32((__m512i)v.part[0], _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtusepi32_epi8(positive));
#elif defined(__AVX2__)
  // packed within each half of the register: 0 to 3 and 8 to 11, 4 to 7 and 12 to 15
  const __m256i shorts = _mm256_packs_epi32((__m256i)v.part[0], (__m256i)v.part[1]);
  const __m256i packed = _mm256_packus_epi16(shorts, shorts);
  const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(ordered));
#else
  const Ints low = choose(v < 0, Ints(), v), cut = choose(low > 255, Ints(255), low);
  for (int64_t i = 0; i < LANES; ++i) at[i] = static_cast<uint8_t>(cut[i]);
#endif
}

}  // namespace fastmim
