#include <cmath>

#include "pointwise_loss/pointwise_loss.h"

namespace fusedstep::pointwise_loss {

namespace {

template <class A>
Reciprocal<double> reciprocal_in(double a, double b) {
    double const product = a * b;
    double const lost = std::fma(a, b, -product);
    auto const excess = [&](A number) {
        double const x = static_cast<double>(number);
        return std::fma(x, product, -1.0) + x * lost;
    };
    A high = static_cast<A>(1.0 / product);
    if (excess(high) > 0) high = std::nextafter(high, A{});
    A low = static_cast<A>(-excess(high) / product);
    // Where the reciprocal is exact: so little that it adds nothing, and not so little that
    // products are subnormal, which processors may take a hundred cycles and more for.
    if (!(low > 0)) low = high * static_cast<A>(0x1p-60);
    return {static_cast<double>(high), static_cast<double>(low)};
}

}  // namespace

Reciprocal<double> reciprocal(double a, double b, DType dtype) {
    return dtype == DType::float64 ? reciprocal_in<double>(a, b) : reciprocal_in<float>(a, b);
}

const CpuKernels& cpu_kernels() { return FUSEDSTEP_SELECT_LEVEL; }

}  // namespace fusedstep::pointwise_loss
