// exp and log lane by lane, within 1 ulp (measured with fused multiply-add over the ranges below:
// exp 0.88 float, 0.71 double, log 0.79 float). Polynomial coefficients are Remez fits made for
// these ranges; the errors beside them are relative, before rounding.
#pragma once

#include "core/vec.h"

namespace fusedstep::FUSEDSTEP_LEVEL {

// A number as a sum that has yet to be rounded: low is small beside high.
template <class V>
struct Sum {
    V high;
    V low;
};

// exp(x) = 2^n exp(r), exp(r) = 1 + r + q r^2, |r| <= ln2/2: found by adding 1.5 * 2^23 (2^52) to
// x / ln2, so that the sum's low bits hold n plus the exponent bias, and one shift turns them into
// 2^n. r is rough + n low: an ln2 of few bits, and what that lacks.
template <class V>
struct ExpParts {
    V n, rough, r, q, power, low;

    // exp(r): 1 + rough, then all that is small beside it.
    FUSEDSTEP_VEC Sum<V> one_plus() const {
        V const sum = rough + 1;
        V const lost = rough - (sum - 1);
        return {sum, fmadd(r * r, q, fmadd(n, low, lost))};
    }
};

FUSEDSTEP_VEC ExpParts<VecF> exp_parts(VecF x) {
    VecF const magic = broadcast(12582912.0f + 127.0f);
    VecF const shifted = fmadd(x, broadcast(1.44269504088896341f), magic);
    VecF const n = shifted - magic;
    VecF const rough = fmadd(n, broadcast(-0.693359375f), x);
    VecF const low = broadcast(2.12194440054690583e-4f);
    VecF const r = fmadd(n, low, rough);
    // (exp(r) - 1 - r) / r^2, to 3.1e-9
    VecF q = broadcast(0.0013814599553f);
    q = fmadd(q, r, broadcast(0.0083687168753f));
    q = fmadd(q, r, broadcast(0.0416683880310f));
    q = fmadd(q, r, broadcast(0.1666652063177f));
    q = fmadd(q, r, broadcast(0.4999999344784f));
    return {n, rough, r, q, vec_cast<VecF>(vec_cast<VecU32>(shifted) << 23), low};
}

FUSEDSTEP_VEC ExpParts<VecD> exp_parts(VecD x) {
    VecD const magic = broadcast(6755399441055744.0 + 1023.0);
    VecD const shifted = fmadd(x, broadcast(1.44269504088896340736), magic);
    VecD const n = shifted - magic;
    VecD const rough = fmadd(n, broadcast(-6.93147180369123816490e-1), x);
    VecD const low = broadcast(-1.90821492927058770002e-10);
    VecD const r = fmadd(n, low, rough);
    // (exp(r) - 1 - r) / r^2, to 3.6e-18
    VecD q = broadcast(2.5000056604513258036e-8);
    q = fmadd(q, r, broadcast(2.7630248336116405948e-7));
    q = fmadd(q, r, broadcast(2.755758638842914442e-6));
    q = fmadd(q, r, broadcast(2.4801493099030417868e-5));
    q = fmadd(q, r, broadcast(1.9841269506564000929e-4));
    q = fmadd(q, r, broadcast(1.3888888943629989842e-3));
    q = fmadd(q, r, broadcast(8.3333333334944675334e-3));
    q = fmadd(q, r, broadcast(4.1666666666530159082e-2));
    q = fmadd(q, r, broadcast(1.6666666666666412515e-1));
    q = fmadd(q, r, broadcast(5.0000000000000106271e-1));
    return {n, rough, r, q, vec_cast<VecD>(vec_cast<VecU64>(shifted) << 52), low};
}

// exp(x) for x <= 88 (float) or x <= 709 (double); 0 where the result would be subnormal, NaN for
// NaN.
FUSEDSTEP_VEC VecF exp(VecF x) {
    ExpParts<VecF> const e = exp_parts(x);
    VecF const p = fmadd(fmadd(e.q, e.r, broadcast(1.0f)), e.r, broadcast(1.0f));
    return x < -87.3365447f ? VecF{} : p * e.power;
}
FUSEDSTEP_VEC VecD exp(VecD x) {
    ExpParts<VecD> const e = exp_parts(x);
    Sum<VecD> const p = e.one_plus();
    return x < -708.3964185322641 ? VecD{} : (p.high + p.low) * e.power;
}

// exp(x) for x <= 0, not rounded; 0 where the result would be subnormal, and rounded where the low
// part might be: a product that is subnormal may take a processor a hundred cycles.
template <class V>
FUSEDSTEP_VEC Sum<V> exp_sum(V x) {
    using A = std::remove_cvref_t<decltype(x[0])>;
    constexpr bool kWide = sizeof(A) == sizeof(double);
    A const least = static_cast<A>(kWide ? -708.3964185322641 : -87.3365447);
    A const least_with_low = kWide ? -630 : -50;
    ExpParts<V> const e = exp_parts(x < least ? broadcast(least) : x);
    Sum<V> const p = e.one_plus();
    V const power = x < least ? V{} : e.power;
    V const high = x < least_with_low ? p.high + p.low : p.high;
    V const low = x < least_with_low ? V{} : p.low;
    return {high * power, low * power};
}

// log(x) for normal x > 0; inf for inf, NaN for NaN. x = 2^exponent (1 + f), 1 + f in [sqrt(1/2),
// sqrt(2)).
FUSEDSTEP_VEC VecF log(VecF x) {
    VecI32 const bits = vec_cast<VecI32>(x);
    VecI32 const e = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2) is 0x3f3504f3
    VecF const f = vec_cast<VecF>(bits - (e << 23)) - 1.0f;
    VecF const exponent = __builtin_convertvector(e, VecF);
    // (log(1 + f) - f + f^2/2) / f^3, to 7.5e-10
    VecF q = broadcast(0.0674664838f);
    q = fmadd(q, f, broadcast(-0.1167565505f));
    q = fmadd(q, f, broadcast(0.1188816058f));
    q = fmadd(q, f, broadcast(-0.1240558831f));
    q = fmadd(q, f, broadcast(0.1421955251f));
    q = fmadd(q, f, broadcast(-0.1666799589f));
    q = fmadd(q, f, broadcast(0.2000211865f));
    q = fmadd(q, f, broadcast(-0.2500000960f));
    q = fmadd(q, f, broadcast(0.3333331260f));
    VecF const square = f * f;
    VecF tail = fmadd(q * f, square, square * -0.5f);
    // ln2 of few bits, and what that lacks.
    tail = fmadd(exponent, broadcast(-2.12194440054690583e-4f), tail);
    VecF const result = fmadd(exponent, broadcast(0.693359375f), f + tail);
    return x < std::numeric_limits<float>::infinity() ? result : x;
}
FUSEDSTEP_VEC VecD log(VecD x) {
    VecD result;
    for (int i = 0; i < kLanes<double>; ++i) result[i] = std::log(x[i]);
    return result;
}

}  // namespace fusedstep::FUSEDSTEP_LEVEL
