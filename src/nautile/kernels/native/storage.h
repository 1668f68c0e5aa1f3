// How the weights of a panel are kept: as floats, as pairs of bfloat16, or on the grid they were quantised to, in 8 or 4 bits
// with a power of two for every output and group of inputs. Whatever is kept, the numbers are the same; narrower ones are made
// bfloat16 again in registers, so a product has the same bits. Layouts, per panel:
//
//   FLOATS  [inputs][tiles][16] float                    PAIRED  [inputs / 2][tiles][16] pairs of bfloat16
//   EIGHTS  tables (256 bytes), then groups of 64 inputs: 64 bytes of powers, [32][2][64] codes e4m3
//   FOURS   a table (64 bytes), then groups of 32 inputs: 64 bytes of powers, [16][32] words of four codes e2m1, one a tile
//
// A table gives each code its bfloat16 at the largest power in the panel; the bytes say how many powers of two less an output's
// group has. Subtracting that from the exponent with saturation leaves zero alone (codes of minus zero are not used).
#pragma once
#include <algorithm>
#include <vector>
#include "memory.h"
#include "vec.h"

namespace nautile {

enum Storage { FLOATS, PAIRED, EIGHTS, FOURS };

constexpr int PANEL = 4;  // tiles of one panel
#if defined(__AVX512F__)
constexpr int TOGETHER = PANEL;  // tiles of one register block
#else
constexpr int TOGETHER = 1;
#endif
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
constexpr bool NARROW = true;  // codes can be looked up in registers
#else
constexpr bool NARROW = false;
#endif

// Numbers of few bits: e2m1 and e4m3, but with 480 in place of e4m3's NaN.
struct Grid {
    int mantissa, bias, largest;  // bits; of the exponent; exponent of the largest number
    int group, header, pair;      // inputs that share a power; bytes before the groups; bytes of one pair of inputs
    int codes() const { return (largest + bias + 1) << mantissa; }
    float value(int code) const {
        int exponent = code >> mantissa, rest = code & ((1 << mantissa) - 1);
        if (!exponent) return std::ldexp((float)rest, 1 - bias - mantissa);
        return std::ldexp((float)(rest + (1 << mantissa)), exponent - bias - mantissa);
    }
    // The code of x >= 0, or -1 where the grid does not have it.
    int code(float x) const {
        if (x < std::ldexp(1.0f, 1 - bias)) {
            float steps = x * (float)(1 << (bias + mantissa - 1));
            return steps == (float)(int)steps ? (int)steps : -1;
        }
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const int dropped = 23 - mantissa;
        if (bits & ((1u << dropped) - 1)) return -1;
        const int code = (int)(bits >> dropped) - ((127 - bias) << mantissa);
        return code < codes() ? code : -1;
    }
    int64_t bytes(int inputs) const { return header + (int64_t)inputs / group * 64 + (int64_t)inputs / 2 * pair; }
};
constexpr Grid E2M1{1, 1, 2, 32, 64, 64}, E4M3{3, 7, 8, 64, 256, 128};

// The codes of one panel's weights, [64 outputs][inputs], if the grid has all of them.
class Codes {
  public:
    Codes(const Grid& grid, const float* weights, int inputs) : grid_(grid), inputs_(inputs), groups_(inputs / grid.group) {
        fits_ = inputs % grid.group == 0;
        codes_.resize(fits_ ? (size_t)PANEL * LANES * inputs : 0), powers_.assign((size_t)PANEL * LANES * groups_, NONE);
        for (int n = 0; fits_ && n < PANEL * LANES; n++)
            for (int g = 0; fits_ && g < groups_; g++) read(weights + (int64_t)n * inputs + g * grid.group, n, g);
    }
    bool fit() const { return fits_; }
    uint8_t code(int n, int k) const { return codes_[(size_t)n * inputs_ + k]; }
    int top() const { return std::max(-MOST, *std::max_element(powers_.begin(), powers_.end())); }
    uint8_t less(int n, int g, int top) const { return (uint8_t)(power(n, g) == NONE ? 0 : top - power(n, g)); }

  private:
    static constexpr int MOST = 90, NONE = -1000;  // no number comes near the ends of the range of bfloat16
    int power(int n, int g) const { return powers_[(size_t)n * groups_ + g]; }
    // The largest number in the grid's highest octave makes the grid as fine as it can be.
    void read(const float* x, int n, int g) {
        float most = 0.0f;
        for (int k = 0; k < grid_.group; k++) most = std::max(most, std::fabs(x[k]));
        if (most == 0.0f) return;
        const int exponent = std::ilogb(most);
        if (!(fits_ = exponent >= -MOST && exponent <= MOST)) return;
        const int power = powers_[(size_t)n * groups_ + g] = exponent - grid_.largest;
        const float factor = std::ldexp(1.0f, -power);
        for (int k = 0; k < grid_.group; k++) {
            const int code = grid_.code(std::fabs(x[k]) * factor);
            if (!(fits_ = code >= 0)) return;
            codes_[(size_t)n * inputs_ + g * grid_.group + k] = (uint8_t)(code | (x[k] < 0.0f ? grid_.codes() : 0));
        }
    }

    const Grid grid_;
    const int inputs_, groups_;
    bool fits_;
    std::vector<uint8_t> codes_;
    std::vector<int> powers_;
};

// Writers, of panels of PANEL tiles.
static inline void write_powers(const Codes& codes, int g, int top, uint8_t* out) {
    for (int n = 0; n < PANEL * LANES; n++) out[n] = codes.less(n, g, top);
}
static inline void write_fours(const Codes& codes, int inputs, uint8_t* out) {
    const int top = codes.top();
    uint16_t* words = (uint16_t*)out;
    for (int code = 0; code < 32; code++)  // five bits are looked at: the fifth is another code's
        words[code] = to_bf16(std::ldexp(E2M1.value(code & 7), top)) | (uint16_t)((code & 8) << 12);
    out += E2M1.header;
    for (int k = 0; k < inputs; k += 2, out += E2M1.pair) {
        if (k % E2M1.group == 0) write_powers(codes, k / E2M1.group, top, out), out += 64;
        for (int word = 0; word < 2 * LANES; word++) {
            uint16_t four = 0;
            for (int t = 0; t < PANEL; t++) four |= (uint16_t)(codes.code(t * LANES + word / 2, k + word % 2) << (4 * t));
            std::memcpy(out + 2 * word, &four, 2);
        }
    }
}
static inline void write_eights(const Codes& codes, int inputs, uint8_t* out) {
    const int top = codes.top();
    for (int code = 0; code < 128; code++) {
        const uint16_t word = to_bf16(std::ldexp(E4M3.value(code), top));
        out[code] = (uint8_t)word, out[128 + code] = (uint8_t)(word >> 8);
    }
    out += E4M3.header;
    for (int k = 0; k < inputs; k += 2, out += E4M3.pair) {
        if (k % E4M3.group == 0) write_powers(codes, k / E4M3.group, top, out), out += 64;
        // Interleaving low and high bytes takes eight of every sixteen: those of one tile, then those of the next.
        for (int half = 0; half < 2; half++)
            for (int byte = 0; byte < 64; byte++) {
                const int tile = 2 * half + byte % 16 / 8, word = byte / 16 * 8 + byte % 8;
                out[64 * half + byte] = codes.code(tile * LANES + word / 2, k + word % 2);
            }
    }
}

// Readers: `begin` at each group of GROUP steps, then `read` for the columns of one step (an input, or a pair of them).
template <int T, bool PAIRS_> struct Plain {
    static constexpr int TILES = T, GROUP = 1;
    static constexpr bool PAIRS = PAIRS_;
    const uint32_t* at;
    int64_t step, ahead;  // words from one step to the next; how early memory is fetched
    void begin() {}
    void read(uvec* column) {
        for (int t = 0; t < T; t++) std::memcpy(&column[t], at + t * LANES, 64);
        for (int t = 0; t < T; t++) __builtin_prefetch(at + t * LANES + ahead);
        at += step;
    }
};

#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
template <int GROUP_> struct Coded {
    static constexpr int TILES = PANEL, GROUP = GROUP_;
    static constexpr bool PAIRS = true;
    const uint8_t* at;
    int64_t ahead;  // bytes
    __m512i less[PANEL];

    __m512i line() {
        const __m512i bytes = _mm512_loadu_si512(at);
        __builtin_prefetch(at + ahead);
        at += 64;
        return bytes;
    }
    void begin() {
        __builtin_prefetch(at + ahead);
        for (int t = 0; t < PANEL; t++, at += LANES) {
            const __m512i exponent = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)), 7);
            less[t] = _mm512_or_si512(exponent, _mm512_slli_epi32(exponent, 16));
        }
    }
    uvec scaled(__m512i words, int t) const { return (uvec)_mm512_subs_epu16(words, less[t]); }
};
struct Fours : Coded<E2M1.group / 2> {
    __m512i table;
    Fours(const void* panel, int64_t ahead) : Coded{(const uint8_t*)panel + E2M1.header, ahead, {}}, table(_mm512_loadu_si512(panel)) {}
    void read(uvec* column) {
        const __m512i words = line();
        column[0] = scaled(_mm512_permutexvar_epi16(words, table), 0);
        column[1] = scaled(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table), 1);
        column[2] = scaled(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table), 2);
        column[3] = scaled(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table), 3);
    }
};
struct Eights : Coded<E4M3.group / 2> {
    __m512i table[4];
    Eights(const void* panel, int64_t ahead) : Coded{(const uint8_t*)panel + E4M3.header, ahead, {}} {
        for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_si512((const uint8_t*)panel + 64 * i);
    }
    void read(uvec* column) {
        const __m512i sign = _mm512_set1_epi8((char)0x80);
        for (int half = 0; half < 2; half++) {
            const __m512i codes = line();
            const __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
            const __m512i magnitude = _mm512_permutex2var_epi8(table[2], codes, table[3]);
            const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xF8);  // magnitude | (codes & sign)
            column[2 * half] = scaled(_mm512_unpacklo_epi8(low, high), 2 * half);
            column[2 * half + 1] = scaled(_mm512_unpackhi_epi8(low, high), 2 * half + 1);
        }
    }
};
#endif

// The weights of one panel in the narrowest storage that has all of them. `rounded`: for products of bfloat16, which take
// floats rounded to it.
struct Panel {
    const uint32_t* data = nullptr;
    int storage = FLOATS;

    static Panel make(Slab& slab, const float* weights, int tiles, int inputs, bool rounded, bool narrow) {
        const bool whole = tiles == PANEL && narrow && NARROW;
        if (whole)
            for (int storage : {FOURS, EIGHTS}) {
                const Grid& grid = storage == FOURS ? E2M1 : E4M3;
                Codes codes(grid, weights, inputs);
                if (!codes.fit()) continue;
                uint8_t* data = slab.take<uint8_t>(grid.bytes(inputs));
                storage == FOURS ? write_fours(codes, inputs, data) : write_eights(codes, inputs, data);
                return {(const uint32_t*)data, storage};
            }
        const bool paired = rounded || (whole && inputs % 2 == 0 && all_bf16(weights, (int64_t)tiles * LANES * inputs));
        return paired ? make_pairs(slab, weights, tiles, inputs) : make_floats(slab, weights, tiles, inputs);
    }

  private:
    static bool all_bf16(const float* x, int64_t count) {
        for (int64_t i = 0; i < count; i++)
            if (from_bf16(to_bf16(x[i])) != x[i]) return false;
        return true;
    }
    static Panel make_floats(Slab& slab, const float* weights, int tiles, int inputs) {
        const int width = tiles * LANES;
        float* data = slab.take<float>((int64_t)width * inputs);
        for (int n = 0; n < width; n++)
            for (int k = 0; k < inputs; k++) data[(int64_t)k * width + n] = weights[(int64_t)n * inputs + k];
        return {(const uint32_t*)data, FLOATS};
    }
    static Panel make_pairs(Slab& slab, const float* weights, int tiles, int inputs) {
        const int width = tiles * LANES;
        uint32_t* data = slab.take<uint32_t>((int64_t)width * ((inputs + 1) / 2));
        for (int n = 0; n < width; n++)
            for (int k = 0; k < inputs; k++)
                ((uint16_t*)(data + (int64_t)(k / 2) * width + n))[k % 2] = to_bf16(weights[(int64_t)n * inputs + k]);
        return {data, PAIRED};
    }
};

}  // namespace nautile
