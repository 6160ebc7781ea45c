// What the emulator keeps in the 128 bytes of a tensor map: runtime.cpp writes it, where the driver's
// cuTensorMapEncodeTiled is expected, and ptx_hopper.cuh reads it.
#pragma once
#include <stdint.h>

namespace emulator {

constexpr uint64_t MAP_MAGIC = 0x50414d524f534e54;  // "TNSORMAP"

struct EncodedMap {
    uint64_t magic;
    unsigned char* address;
    uint64_t sizes[5];                           // in elements, the innermost first
    uint64_t strides[4];                         // in bytes, from the second dimension on
    uint16_t box[5];                             // in elements
    uint8_t rank, type, element_bytes, swizzle;  // type, swizzle: the driver's numbers
    uint16_t padding;
    uint64_t sum;  // of the bytes before, see checksum

    // The span in bytes within which 16-byte chunks change places, 16 if none does.
    int swizzle_span() const { return 16 << swizzle; }
    int row_bytes() const { return box[0] * element_bytes; }
    int rows() const {
        int result = 1;
        for (int i = 1; i < rank; i++) result *= box[i];
        return result;
    }
};
static_assert(sizeof(EncodedMap) <= 128, "a tensor map has 128 bytes");

inline uint64_t checksum(const EncodedMap& map) {
    uint64_t sum = 0xcbf29ce484222325;
    for (const unsigned char* p = (const unsigned char*)&map; p < (const unsigned char*)&map.sum; p++)
        sum = (sum ^ *p) * 0x100000001b3;
    return sum;
}

}  // namespace emulator
