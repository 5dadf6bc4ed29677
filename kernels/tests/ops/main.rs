//! Every op, on every instruction set of this CPU, against `polylora_kernels::reference`: plain
//! loops in f64.

mod attention;
mod common;
mod ints;
mod linear;
mod pointwise;
mod sums;
