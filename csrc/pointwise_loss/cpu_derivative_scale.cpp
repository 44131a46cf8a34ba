#include <cmath>
#include <limits>

#include "pointwise_loss/pointwise_loss.h"

namespace fusedstep::pointwise_loss {
namespace {

// 1 / (a b), whose error is less than the last bit of low: high is rounded towards 0, low is what
// that leaves.
template <class A>
Reciprocal<double> reciprocal(double a, double b) {
    double const product = a * b;
    double const lost = std::fma(a, b, -product);
    auto const excess = [&](A number) {
        double const x = static_cast<double>(number);
        return std::fma(x, product, -1.0) + x * lost;
    };
    A high = static_cast<A>(1.0 / product);
    while (excess(high) > 0) high = std::nextafter(high, A{});
    A low = static_cast<A>(-excess(high) / product);
    // Where the reciprocal is exact, low stands for 0: it is too small to change a sum. It is no
    // smaller, because its products would be subnormal, for which processors take a hundred cycles
    // and more.
    if (!(low > 0)) low = high * (std::numeric_limits<A>::epsilon() / 16);
    return {static_cast<double>(high), static_cast<double>(low)};
}

template <class A>
Reciprocal<double> derivative_scale(Kind kind, double parameter, double divisor) {
    // By beta as evaluate() has it, rounded to A: where |d| reaches it the derivative is 1.
    if (kind == Kind::smooth_l1) return reciprocal<A>(divisor, static_cast<A>(parameter));
    return reciprocal<A>(divisor, kind == Kind::mse ? 0.5 : 1);
}

}  // namespace

Reciprocal<double> derivative_scale(Kind kind, double parameter, double divisor, DType dtype) {
    return dtype == DType::float64 ? derivative_scale<double>(kind, parameter, divisor)
                                   : derivative_scale<float>(kind, parameter, divisor);
}

}  // namespace fusedstep::pointwise_loss
