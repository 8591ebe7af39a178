// Stands in for the part of CUDA's runtime that other headers include.
#pragma once

#include "cuda_runtime.h"
