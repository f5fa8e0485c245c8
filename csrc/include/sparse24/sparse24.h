// sparse24.h: the whole public C++ API.
#pragma once

#include "sparse24/activation.h"
#include "sparse24/activation_pack.h"
#include "sparse24/device.h"
#include "sparse24/formats.h"
#include "sparse24/gemm.h"
#include "sparse24/pack.h"
#include "sparse24/quantize.h"
#include "sparse24/recipe.h"
#include "sparse24/types.h"
