// Element types: how 16-bit floats become fp32 and back, rounding to nearest even.

#pragma once

#include <cstdint>
#include <cstring>

namespace moe_prune {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Bf16 {
  uint16_t bits;

  operator float() const { return as_float(static_cast<uint32_t>(bits) << 16); }

  static Bf16 of(float value) {
    uint32_t wide = as_bits(value);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    bool nan = (wide & 0x7fffffff) > 0x7f800000;
    return {static_cast<uint16_t>(nan ? (wide >> 16) | 0x40 : rounded)};
  }
};

struct F16 {
  uint16_t bits;

  operator float() const {
    // Exponent and mantissa moved into place and scaled by 2^112, which is exact for
    // denormals too; infinity and NaN are put back.
    uint32_t moved = static_cast<uint32_t>(bits & 0x7fff) << 13;
    uint32_t wide = as_bits(as_float(moved) * 0x1p112f);
    wide = (bits & 0x7c00) == 0x7c00 ? moved | 0x7f800000 : wide;
    return as_float(wide | static_cast<uint32_t>(bits & 0x8000) << 16);
  }

  static F16 of(float value) {
    uint32_t wide = as_bits(value), sign = (wide >> 16) & 0x8000;
    wide &= 0x7fffffff;
    uint32_t half;
    if (wide > 0x7f800000) {
      half = 0x7e00;
    } else if (wide >= 0x477ff000) {  // 65520, half-way to what does not fit
      half = 0x7c00;
    } else if (wide < 0x38800000) {  // denormal: the addition rounds
      half = as_bits(as_float(wide) + 0.5f) - 0x3f000000;
    } else {
      half = (wide - 0x38000000 + 0xfff + ((wide >> 13) & 1)) >> 13;
    }
    return {static_cast<uint16_t>(half | sign)};
  }
};

// e4m3 without infinities; weights only.
struct F8 {
  uint8_t bits;

  operator float() const {
    const uint32_t size = bits & 0x7f, sign = static_cast<uint32_t>(bits & 0x80) << 24;
    // Moved into place and scaled by 2^120, which is exact for denormals too.
    float value = as_float(size << 20) * 0x1p120f;
    return as_float((size == 0x7f ? 0x7fc00000 : as_bits(value)) | sign);
  }
};

// Integers of so many bits; weights only, and never one by one.
template <int BITS>
struct Int {};

struct F32 {
  float value;

  operator float() const { return value; }

  static F32 of(float value) { return {value}; }
};

}  // namespace moe_prune
