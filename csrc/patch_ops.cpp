// Kernels of torch.ops.anyflow.pack_patches and unpack_patches: allocation, and the checks without which a call could
// leave its memory. Schemas, fakes, autograd and the GEMM are in anyflow_kernels/patch_embed.py, the contract in
// anyflow_kernels/operations.py. Only PyTorch's stable ABI is used, so one build serves every torch from 2.11 on.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "patch_ops.h"

namespace anyflow {
namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

std::string text(Sizes sizes) {
  std::string all;
  for (const int64_t size : sizes) all += (all.empty() ? "(" : ", ") + std::to_string(size);
  return all.empty() ? "()" : all + ")";
}

bool floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// The geometry of latents of these sizes; strides are still to be filled in.
PatchGeometry split(Sizes size, Sizes patch, bool channels_last) {
  STD_TORCH_CHECK(size.size() == 5, "latents: got ", text(size), ", expected (B, F, C, H, W)");
  STD_TORCH_CHECK(patch.size() == 3 && patch[0] > 0 && patch[1] > 0 && patch[2] > 0,
                  "patch_size: got ", text(patch), ", expected three positive integers");
  PatchGeometry g{};
  g.batch = size[0];
  g.frames = size[1] / patch[0];
  g.rows = size[3] / patch[1];
  g.columns = size[4] / patch[2];
  g.channels = size[2];
  g.patch_t = patch[0];
  g.patch_h = patch[1];
  g.patch_w = patch[2];
  g.channels_last = channels_last;
  return g;
}

int64_t tokens_per_sample(const PatchGeometry& g) { return g.frames * g.rows * g.columns; }

void set_strides(PatchGeometry& g, const Tensor& latents, const Tensor& tokens) {
  for (int i = 0; i < 5; ++i) g.latent_stride[i] = latents.stride(i);
  for (int i = 0; i < 2; ++i) g.token_stride[i] = tokens.stride(i);
}

Tensor pack_patches(const Tensor& latents, Sizes patch_size, bool channels_last, ScalarType dtype) {
  STD_TORCH_CHECK(floating(latents.scalar_type()) && floating(dtype), "pack_patches: got ",
                  toString(latents.scalar_type()), " to ", toString(dtype),
                  ", expected float32, bfloat16, float16 or float64");
  PatchGeometry g = split(latents.sizes(), patch_size, channels_last);
  Tensor tokens = torch::stable::new_empty(latents, {g.batch, tokens_per_sample(g), g.features()}, dtype);
  if (tokens.numel() == 0) return tokens;
  set_strides(g, latents, tokens);
#ifdef ANYFLOW_WITH_CUDA
  if (latents.is_cuda()) {
    pack_cuda(latents, tokens, g);
    return tokens;
  }
#endif
  pack_cpu(latents, tokens, g);
  return tokens;
}

Tensor unpack_patches(const Tensor& tokens, Sizes size, Sizes patch_size, bool channels_last, ScalarType dtype) {
  STD_TORCH_CHECK(floating(tokens.scalar_type()) && floating(dtype), "unpack_patches: got ",
                  toString(tokens.scalar_type()), " to ", toString(dtype),
                  ", expected float32, bfloat16, float16 or float64");
  PatchGeometry g = split(size, patch_size, channels_last);
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(0) == g.batch && tokens.size(1) == tokens_per_sample(g) &&
                      tokens.size(2) == g.features(),
                  "tokens: got ", text(tokens.sizes()), ", expected ",
                  text({g.batch, tokens_per_sample(g), g.features()}));
  const bool remainder =
      g.frames * g.patch_t != size[1] || g.rows * g.patch_h != size[3] || g.columns * g.patch_w != size[4];
  Tensor latents = (remainder ? torch::stable::new_zeros : torch::stable::new_empty)(
      tokens, size, dtype, std::nullopt, std::nullopt, std::nullopt);
  if (tokens.numel() == 0) return latents;
  const Tensor dense = tokens.stride(2) == 1 || g.features() == 1 ? tokens : torch::stable::contiguous(tokens);
  set_strides(g, latents, dense);
#ifdef ANYFLOW_WITH_CUDA
  if (tokens.is_cuda()) {
    unpack_cuda(dense, latents, g);
    return latents;
  }
#endif
  unpack_cpu(dense, latents, g);
  return latents;
}

}  // namespace

#define ANYFLOW_REGISTER(KEY)                             \
  STABLE_TORCH_LIBRARY_IMPL(anyflow, KEY, m) {            \
    m.impl("pack_patches", TORCH_BOX(&pack_patches));     \
    m.impl("unpack_patches", TORCH_BOX(&unpack_patches)); \
  }

ANYFLOW_REGISTER(CPU)
#ifdef ANYFLOW_WITH_CUDA
ANYFLOW_REGISTER(CUDA)
#endif

}  // namespace anyflow

// Importing the module loads this library, which registers the kernels above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
