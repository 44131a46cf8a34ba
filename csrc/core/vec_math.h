// exp and log lane by lane, within 1 ulp (measured with fused multiply-add over the ranges below:
// exp 0.88 float, 0.71 double, exp_closely 0.69, log 0.79 float). Polynomial coefficients are Remez
// fits made for these ranges; the errors beside them are relative, before rounding.
#pragma once

#include "core/vec.h"

namespace fusedstep::FUSEDSTEP_LEVEL {

// 1 + (a + n b + square q), where the rest is small beside 1 + a: rounded once but for the rest.
template <class V>
FUSEDSTEP_VEC V one_plus(V a, V n, V b, V square, V q) {
    V const sum = a + 1;
    V const lost = a - (sum - 1);
    return sum + fmadd(square, q, fmadd(n, b, lost));
}

// exp(x) = 2^n exp(r), exp(r) = 1 + r + q r^2, |r| <= ln2/2: found by adding 1.5 * 2^23 (2^52) to
// x / ln2, so that the sum's low bits hold n plus the exponent bias, and one shift turns them into
// 2^n. r is rough + n low: a float's ln2 of few bits, and what that lacks.
struct ExpParts {
    static constexpr float kLow = 2.12194440054690583e-4f;
    VecF n, rough, r, q, power;
};
FUSEDSTEP_VEC ExpParts exp_parts(VecF x) {
    VecF const magic = broadcast(12582912.0f + 127.0f);
    VecF const shifted = fmadd(x, broadcast(1.44269504088896341f), magic);
    VecF const n = shifted - magic;
    VecF const rough = fmadd(n, broadcast(-0.693359375f), x);
    VecF const r = fmadd(n, broadcast(ExpParts::kLow), rough);
    // (exp(r) - 1 - r) / r^2, to 3.1e-9
    VecF q = broadcast(0.0013814599553f);
    q = fmadd(q, r, broadcast(0.0083687168753f));
    q = fmadd(q, r, broadcast(0.0416683880310f));
    q = fmadd(q, r, broadcast(0.1666652063177f));
    q = fmadd(q, r, broadcast(0.4999999344784f));
    return {n, rough, r, q, vec_cast<VecF>(vec_cast<VecU32>(shifted) << 23)};
}

// exp(x) for x <= 88 (float) or x <= 709 (double); 0 where the result would be subnormal, NaN for
// NaN.
FUSEDSTEP_VEC VecF exp(VecF x) {
    ExpParts const e = exp_parts(x);
    VecF const p = fmadd(fmadd(e.q, e.r, broadcast(1.0f)), e.r, broadcast(1.0f));
    return x < -87.3365447f ? VecF{} : p * e.power;
}

// The same with a smaller error, for 5 instructions more.
FUSEDSTEP_VEC VecF exp_closely(VecF x) {
    ExpParts const e = exp_parts(x);
    VecF const p = one_plus(e.rough, e.n, broadcast(ExpParts::kLow), e.r * e.r, e.q);
    return x < -87.3365447f ? VecF{} : p * e.power;
}

FUSEDSTEP_VEC VecD exp(VecD x) {
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
    VecD const result =
        one_plus(rough, n, low, r * r, q) * vec_cast<VecD>(vec_cast<VecU64>(shifted) << 52);
    return x < -708.3964185322641 ? VecD{} : result;
}

// log(x) = exponent ln2 + f + tail, of normal x > 0: x = 2^exponent (1 + f), 1 + f in
// [sqrt(1/2), sqrt(2)), where the tail has what the rounded ln2 lacks.
struct LogParts {
    static constexpr float kLn2 = 0.693359375f;
    VecF exponent, f, tail;
};
FUSEDSTEP_VEC LogParts log_parts(VecF x) {
    VecI32 const bits = vec_cast<VecI32>(x);
    VecI32 const e = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2) is 0x3f3504f3
    VecF const m = vec_cast<VecF>(bits - (e << 23));
    VecF const exponent = __builtin_convertvector(e, VecF);
    VecF const f = m - 1.0f;
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
    return {exponent, f, fmadd(exponent, broadcast(-2.12194440054690583e-4f), tail)};
}

// log(x) for normal x > 0; inf for inf, NaN for NaN.
FUSEDSTEP_VEC VecF log(VecF x) {
    LogParts const log = log_parts(x);
    VecF const result = fmadd(log.exponent, broadcast(LogParts::kLn2), log.f + log.tail);
    return x < std::numeric_limits<float>::infinity() ? result : x;
}

FUSEDSTEP_VEC VecD log(VecD x) {
    VecD result;
    for (int i = 0; i < kLanes<double>; ++i) result[i] = std::log(x[i]);
    return result;
}

// log(x) + rest for 1 <= x <= 2: the exponent is 0 or 1, so that what the tail is added to is
// exact.
FUSEDSTEP_VEC VecF log_plus(VecF x, VecF rest) {
    LogParts const log = log_parts(x);
    return (fmadd(log.exponent, broadcast(LogParts::kLn2), log.f) + log.tail) + rest;
}
FUSEDSTEP_VEC VecD log_plus(VecD x, VecD rest) { return log(x) + rest; }

}  // namespace fusedstep::FUSEDSTEP_LEVEL
