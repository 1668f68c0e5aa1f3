// The selection of the native kernels by itself, for test_select.py: scores in tiles of sixteen, from one or several streams.
#include "select.h"

using namespace nautile;

// Pushes scores[0 .. n) as `parts` streams that are put together afterwards, `tiles` tiles at a time, without what the limits of
// all streams rule out; writes the k chosen indices.
extern "C" void select_best(const float* scores, int n, int k, int tiles, int parts, int32_t* chosen) {
    Selection all, streams[3];
    all.begin(k);
    for (int p = 0; p < parts; p++) {
        Selection& into = parts == 1 ? all : streams[p];
        const int begin = (int)((int64_t)n * p / parts) / 64 * 64, end = p + 1 == parts ? n : (int)((int64_t)n * (p + 1) / parts) / 64 * 64;
        if (parts > 1) into.begin(k);
        for (int i = begin; i < end; i += tiles * LANES) {
            vec some[4];
            for (int t = 0; t < tiles; t++) some[t] = load_some(scores + i + t * LANES, std::max(0, end - i - t * LANES));
            if (tiles == 1) into.push(some[0], i, end);
            else into.push_tiles(some, tiles, i, end);
        }
    }
    for (int p = 0; parts > 1 && p < parts; p++) all.leave_out_under(streams[p].limit());
    for (int p = 0; parts > 1 && p < parts; p++) all.append(streams[p]);
    std::memcpy(chosen, all.finish(), (size_t)k * 4);
}
