//! Why there is no GPU, why it refused, or what it has no operation for: one line each, for the
//! operator.
//!
//! Owns the words. Never says what to serve on instead.

use std::fmt;

use cudarc::driver::DriverError;

/// The library that a driver brings.
pub(super) const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
/// The oldest CUDA whose driver loads our PTX: that of the compiler which `kernels/cuda/build.py`
/// pins; the drivers that came with it; and the oldest GPUs that the PTX is for.
pub(super) const CUDA_MIN: (i32, i32) = (12, 4);
const DRIVER_MIN: u32 = 550;
pub(super) const CAPABILITY_MIN: (i32, i32) = (8, 0);

/// See the module page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The driver's library is not on this machine.
    NoDriver,
    /// The CUDA version that the driver knows.
    OldDriver(i32, i32),
    /// The driver finds only so many.
    NoSuchGpu { index: usize, found: usize },
    /// Its name and compute capability.
    OldGpu { name: String, capability: (i32, i32) },
    /// This operand or operation.
    OnCpuOnly(&'static str),
    /// The driver said no.
    Failed { doing: &'static str, said: String },
}

impl Error {
    /// For `map_err`: what was being done when the driver said no.
    pub(super) fn doing(doing: &'static str) -> impl Fn(DriverError) -> Error {
        move |error| {
            let name = error.error_name().map_or_else(|_| "?".into(), |n| n.to_string_lossy());
            let text = error.error_string().map_or_else(|_| "?".into(), |t| t.to_string_lossy());
            Error::Failed { doing, said: format!("{text} ({name})") }
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoDriver => write!(f, "no NVIDIA driver was found ({LIBRARY})"),
            Error::OldDriver(major, minor) => {
                let (least, least_minor) = CUDA_MIN;
                write!(
                    f,
                    "the NVIDIA driver is too old: it knows CUDA {major}.{minor}, \
                     needed is {least}.{least_minor} (driver {DRIVER_MIN}) or newer"
                )
            }
            Error::NoSuchGpu { found: 0, .. } => {
                write!(f, "the NVIDIA driver finds no GPU on this machine")
            }
            Error::NoSuchGpu { index, found: 1 } => {
                write!(f, "there is no GPU {index}: the NVIDIA driver finds one, number 0")
            }
            Error::NoSuchGpu { index, found } => {
                let last = found - 1;
                write!(f, "there is no GPU {index}: the NVIDIA driver finds {found}, 0 to {last}")
            }
            Error::OldGpu { name, capability: (major, minor) } => {
                let (least, least_minor) = CAPABILITY_MIN;
                write!(
                    f,
                    "{name} is too old: its compute capability is {major}.{minor}, \
                     needed is {least}.{least_minor} or newer"
                )
            }
            Error::OnCpuOnly(what) => {
                write!(
                    f,
                    "{what} is for the CPU only: this version has no operation for it on a GPU"
                )
            }
            Error::Failed { doing, said } => write!(f, "{doing} failed: {said}"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_one_line_that_says_what_is_needed() {
        let check = |error: Error, parts: &[&str]| {
            let line = error.to_string();
            assert!(!line.contains('\n') && parts.iter().all(|p| line.contains(p)), "{line}");
        };
        check(Error::NoDriver, &["no NVIDIA driver", LIBRARY]);
        check(Error::OldDriver(11, 4), &["too old", "CUDA 11.4", "12.4", "driver 550"]);
        check(Error::NoSuchGpu { index: 2, found: 0 }, &["finds no GPU"]);
        check(Error::NoSuchGpu { index: 2, found: 1 }, &["no GPU 2", "finds one, number 0"]);
        check(Error::NoSuchGpu { index: 7, found: 4 }, &["no GPU 7", "finds 4, 0 to 3"]);
        let old = Error::OldGpu { name: "Tesla T4".to_owned(), capability: (7, 5) };
        check(old, &["Tesla T4", "7.5", "8.0"]);
        check(Error::OnCpuOnly("a KV cache"), &["a KV cache", "CPU only", "GPU"]);
        let failed = Error::Failed { doing: "taking memory", said: "none left".to_owned() };
        check(failed, &["taking memory failed: none left"]);
    }
}
