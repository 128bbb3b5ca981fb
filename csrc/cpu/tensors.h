// What the host halves need of torch; all of <ATen/ATen.h> takes twice as long. setup.py precompiles this file, so it includes
// no other of this folder. An operator of at:: that is missing here is one line more.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>
