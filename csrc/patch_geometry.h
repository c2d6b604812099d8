// How latents (batch, frames, channels, rows, columns) split into patches, each patch being the features of one token.
// Free of torch headers: shared by the CPU code, the CUDA kernels and the glue between them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ANYFLOW_HOST_DEVICE __host__ __device__
#else
#define ANYFLOW_HOST_DEVICE
#endif

namespace anyflow {

struct PatchGeometry {
  int64_t batch, frames, rows, columns;  // the token grid; remainder rows and columns of the latents are outside of it
  int64_t channels, patch_t, patch_h, patch_w;
  int64_t latent_stride[5];  // batch, frame, channel, row, column, in elements
  int64_t token_stride[2];   // batch, token, in elements; the features of a token are dense
  // Features ordered (t, h, w, channel), as the head writes them; else (channel, t, h, w), as a Conv3d weight reads
  // them.
  bool channels_last;

  ANYFLOW_HOST_DEVICE int64_t features() const { return channels * patch_t * patch_h * patch_w; }
  // A strip is one row of the token grid: the unit of work of a CPU thread and of a CUDA block.
  ANYFLOW_HOST_DEVICE int64_t strips() const { return batch * frames * rows; }
  ANYFLOW_HOST_DEVICE int64_t strip_elements() const { return columns * features(); }
};

struct StripOffsets {
  int64_t latents, tokens;  // of the first element of a strip
};

ANYFLOW_HOST_DEVICE inline StripOffsets strip_offsets(const PatchGeometry& g, int64_t strip) {
  const int64_t row = strip % g.rows, frame = strip / g.rows % g.frames, batch = strip / g.rows / g.frames;
  return {batch * g.latent_stride[0] + frame * g.patch_t * g.latent_stride[1] + row * g.patch_h * g.latent_stride[3],
          batch * g.token_stride[0] + (frame * g.rows + row) * g.columns * g.token_stride[1]};
}

}  // namespace anyflow
