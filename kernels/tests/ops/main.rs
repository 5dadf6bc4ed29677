//! Every op, on every instruction set of this CPU and on a GPU, against plain loops in f64, most of
//! them `polylora_kernels::reference`.

mod attention;
mod backward;
mod common;
mod cuda;
mod ints;
mod linear;
mod pointwise;
mod sums;
