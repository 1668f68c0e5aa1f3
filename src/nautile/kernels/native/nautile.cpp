// The C interface of the kernels, for ctypes. Nothing here throws: a null or a nonzero result means that memory ran out.
#include "forward_attention.h"
#include "forward_experts.h"

using namespace nautile;

extern "C" {

Model* nautile_model(const Shape* shape, const Numbers* numbers, const GlobalTensors* globals, const LayerTensors* layers,
                     const int64_t* ratios) {
    try {
        return new Model(*shape, *numbers, *globals, layers, ratios);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void nautile_free_model(Model* model) { delete model; }
int64_t nautile_weight_bytes(const Model* model) { return model->weight_bytes(); }

Runner* nautile_runner(const Model* model, int64_t threads, const Pools* pools) {
    try {
        return new Runner(*model, (int)threads, *pools);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void nautile_free_runner(Runner* runner) { delete runner; }

int64_t nautile_step(Runner* runner, const Piece* pieces, int64_t count, const int64_t* ids, const int64_t* blocks,
                     float* logits, const float* streams_in, float* streams_out) {
    try {
        runner->step(pieces, (int)count, ids, blocks, logits, streams_in, streams_out);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Seconds of every part of the steps since the last call.
void nautile_parts(Runner* runner, double* seconds) { runner->parts(seconds); }

// What the compiler was allowed to use, for reports.
const char* nautile_features() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bfloat16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "generic";
#endif
}
}
