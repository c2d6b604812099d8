// The operations of torch.ops.anyflow: schemas, allocation, the GEMM of the patch embedding, and the checks without which
// a call could leave its memory. The contract is checked in anyflow_kernels/operations.py; fakes and autograd are in
// anyflow_kernels/patch_embed.py.
#include <Python.h>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

#include "patch_ops.h"

namespace anyflow {
namespace {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;

bool floating(ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// The geometry of latents of these sizes; strides are still to be filled in.
PatchGeometry split(IntArrayRef size, IntArrayRef patch, bool channels_last) {
  TORCH_CHECK(size.size() == 5, "latents: got ", size.size(), " dimensions, expected (B, F, C, H, W)");
  TORCH_CHECK(patch.size() == 3 && patch[0] > 0 && patch[1] > 0 && patch[2] > 0, "patch_size: got ", patch,
              ", expected three positive integers");
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

Tensor pack_patches(const Tensor& latents, IntArrayRef patch_size, bool channels_last, ScalarType dtype) {
  TORCH_CHECK(floating(latents.scalar_type()) && floating(dtype), "pack_patches: got ", latents.scalar_type(), " to ",
              dtype, ", expected float32, bfloat16, float16 or float64");
  PatchGeometry g = split(latents.sizes(), patch_size, channels_last);
  Tensor tokens = at::empty({g.batch, tokens_per_sample(g), g.features()},
                            latents.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
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

Tensor unpack_patches(const Tensor& tokens, IntArrayRef size, IntArrayRef patch_size, bool channels_last,
                      ScalarType dtype) {
  TORCH_CHECK(floating(tokens.scalar_type()) && floating(dtype), "unpack_patches: got ", tokens.scalar_type(), " to ",
              dtype, ", expected float32, bfloat16, float16 or float64");
  PatchGeometry g = split(size, patch_size, channels_last);
  TORCH_CHECK(tokens.dim() == 3 && tokens.size(0) == g.batch && tokens.size(1) == tokens_per_sample(g) &&
                  tokens.size(2) == g.features(),
              "tokens: got ", tokens.sizes(), ", expected (", g.batch, ", ", tokens_per_sample(g), ", ", g.features(),
              ")");
  const bool remainder =
      g.frames * g.patch_t != size[1] || g.rows * g.patch_h != size[3] || g.columns * g.patch_w != size[4];
  const auto options = tokens.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  Tensor latents = remainder ? at::zeros(size, options) : at::empty(size, options);
  if (tokens.numel() == 0) return latents;
  const Tensor dense = tokens.stride(2) == 1 || g.features() == 1 ? tokens : tokens.contiguous();
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

// oneDNN's fp32 GEMM, or null where torch has none. Measured on an AMD EPYC: 215 GFLOP/s a core against 70 to 100 of
// MKL, which keeps its AVX-512 code for Intel. It cannot write into a given tensor.
const c10::OperatorHandle* onednn_linear() {
  static const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle && at::globalContext().userEnabledMkldnn() ? &*handle : nullptr;
}

// packed (rows, K) @ weight (D, K)^T + bias, into `out` (rows, D)
void project(const Tensor& packed, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  if (packed.is_cpu() && packed.scalar_type() == at::kFloat && onednn_linear()) {
    constexpr int64_t kBlockRows = 512;  // so that the copy finds the block in the cache
    const at::AutoDispatchBelowAutograd guard;
    for (int64_t row = 0; row < packed.size(0); row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, packed.size(0) - row);
      torch::jit::Stack stack{
          packed.narrow(0, row, rows), weight, bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
      onednn_linear()->callBoxed(stack);
      out.narrow(0, row, rows).copy_(stack.at(0).toTensor());
    }
  } else if (bias) {
    at::addmm_out(out, *bias, packed, weight.t());
  } else {
    at::mm_out(out, packed, weight.t());
  }
}

void embed_into(const Tensor& latents, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target) {
  if (target.numel() == 0) return;
  const Tensor packed = pack_patches(latents, weight.sizes().slice(2), false, weight.scalar_type());
  const Tensor matrix = weight.reshape({weight.size(0), -1});
  if (target.is_contiguous()) {
    project(packed.flatten(0, 1), matrix, bias, target.flatten(0, 1));
    return;
  }
  for (int64_t b = 0; b < target.size(0); ++b) project(packed[b], matrix, bias, target[b]);
}

void check_embed(const Tensor& latents, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(latents.dim() == 5 && weight.dim() == 5 && weight.size(1) == latents.size(2), "weight: got ",
              weight.sizes(), ", expected (D, C, pt, ph, pw) for latents (B, F, C, H, W) of ", latents.sizes());
  TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
      "bias: expected shape (", weight.size(0), ",) and dtype ", weight.scalar_type());
}

Tensor patch_embed(const Tensor& latents, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_embed(latents, weight, bias);
  const PatchGeometry g = split(latents.sizes(), weight.sizes().slice(2), false);
  Tensor tokens = at::empty({g.batch, tokens_per_sample(g), weight.size(0)},
                            weight.options().memory_format(at::MemoryFormat::Contiguous));
  embed_into(latents, weight, bias, tokens);
  return tokens;
}

void patch_embed_out(const Tensor& latents, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out,
                     int64_t offset) {
  check_embed(latents, weight, bias);
  const int64_t count = tokens_per_sample(split(latents.sizes(), weight.sizes().slice(2), false));
  TORCH_CHECK(out.dim() == 3 && out.size(0) == latents.size(0) && out.size(2) == weight.size(0) &&
                  out.scalar_type() == weight.scalar_type() && out.stride(2) == 1,
              "out: got ", out.sizes(), " ", out.scalar_type(), ", expected (", latents.size(0), ", T, ",
              weight.size(0), ") ", weight.scalar_type(), " with a dense last dimension");
  TORCH_CHECK(offset >= 0 && offset + count <= out.size(1), "out: holds T=", out.size(1),
              " tokens, need offset + tokens = ", offset + count);
  embed_into(latents, weight, bias, out.narrow(1, offset, count));
}

}  // namespace

TORCH_LIBRARY(anyflow, m) {
  m.set_python_module("anyflow_kernels.patch_embed");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("patch_embed(Tensor latents, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def("patch_embed_out(Tensor latents, Tensor weight, Tensor? bias, Tensor(a!) out, SymInt offset) -> ()", tags);
  m.def("pack_patches(Tensor latents, int[3] patch_size, bool channels_last, ScalarType dtype) -> Tensor", tags);
  m.def(
      "unpack_patches(Tensor tokens, SymInt[] size, int[3] patch_size, bool channels_last, ScalarType dtype) -> Tensor",
      tags);
}

#define ANYFLOW_REGISTER(KEY)                    \
  TORCH_LIBRARY_IMPL(anyflow, KEY, m) {          \
    m.impl("patch_embed", &patch_embed);         \
    m.impl("patch_embed_out", &patch_embed_out); \
    m.impl("pack_patches", &pack_patches);       \
    m.impl("unpack_patches", &unpack_patches);   \
  }

ANYFLOW_REGISTER(CPU)
#ifdef ANYFLOW_WITH_CUDA
ANYFLOW_REGISTER(CUDA)
#endif

}  // namespace anyflow

// Importing the module loads this library, which registers the operations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
