//! Threads that give way to all others.
//!
//! Owns the one call that says so to the system. Never needs a privilege. The thing to know: since
//! Linux 6.6 a thread that wakes waits for the end of a running one's slice, some three
//! milliseconds, whatever the nice values of the two; one of the idle class is interrupted at once.

/// Puts the calling thread into the system's idle class for good; so are the threads that it
/// starts. Whether it is there now: only Linux has such a class.
pub fn give_way() -> bool {
    #[cfg(target_os = "linux")]
    {
        use std::ffi::c_int;
        /// `SCHED_IDLE` in `linux/sched.h`.
        const IDLE: c_int = 5;
        unsafe extern "C" {
            fn sched_setscheduler(pid: c_int, policy: c_int, parameters: *const c_int) -> c_int;
        }
        // `struct sched_param`: the real-time priority, which this class does not have.
        let parameters: c_int = 0;
        // SAFETY: 0 is the calling thread, and the structure, of one integer, is only read.
        unsafe { sched_setscheduler(0, IDLE, &parameters) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_gives_way_is_in_the_idle_class_and_its_parent_is_not() {
        let policy = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("a thread");
            let after = stat.rsplit(") ").next().expect("fields after the name");
            // The 41st field of all; the name was the second.
            after.split(' ').nth(38).map(str::to_owned)
        };
        let thread = std::thread::spawn(move || (super::give_way(), policy()));
        assert_eq!(thread.join().expect("it ends"), (true, Some("5".to_owned())));
        assert_eq!(policy().as_deref(), Some("0"));
    }
}
