//! A team of threads that share the tasks of one op. Owns the threads; never allocates in a run;
//! knows nothing of the work.
//!
//! The caller is worker 0. Tasks are claimed one by one from one atomic word, `(run, tasks left)`,
//! so a worker that was descheduled costs nothing but its own help: the caller returns when every
//! task is done, not when every worker has looked in. Which worker ran a task must not matter to
//! the result; ops write disjoint outputs per task.
//!
//! Idle workers spin for a bounded time (the gap between two ops of a step is a few µs), then park:
//! an idle server burns no CPU. A task that panics is counted as done and the tasks not yet started
//! are dropped; when the run is over the first payload goes on in the caller, so a failed step
//! fails and the team lives.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{self, JoinHandle, Thread};

/// Polls before a waiting thread parks: 20 to 50 µs, about the longest serial stretch within a
/// step.
const POLLS_MAX: u32 = 1500;

/// What one run calls: task and worker number.
type Body<'a> = &'a (dyn Fn(usize, usize) + Sync + 'a);

/// What is written all the time, on cache lines of its own: else all that lies beside it would have
/// to be fetched anew from the other core each time. Two lines, for CPUs fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

struct Post {
    /// High half: number of the run. Low half: tasks not yet claimed.
    ticket: Apart<AtomicU64>,
    /// The running body: a pointer to a `Body` on the caller's stack.
    body: AtomicPtr<()>,
    /// Tasks of the run in all.
    tasks: AtomicU32,
    /// Tasks of the run of which it is not yet known that they are finished.
    unfinished: Apart<AtomicU32>,
    /// The caller parks in wait of `unfinished == 0`.
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    /// A task of the run panicked: the others need not start.
    failed: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

struct Worker {
    parked: Arc<AtomicBool>,
    join: Option<JoinHandle<()>>,
}

/// See the module page.
pub(crate) struct Team {
    post: Arc<Post>,
    workers: Vec<Worker>,
}

impl Team {
    /// A team of `threads`, the caller among them.
    pub(crate) fn new(threads: usize) -> Team {
        assert!(threads >= 1, "a team needs at least one thread");
        let post = Arc::new(Post {
            ticket: Apart::default(),
            body: AtomicPtr::new(std::ptr::null_mut()),
            tasks: AtomicU32::new(0),
            unfinished: Apart::default(),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            failed: AtomicBool::new(false),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        // A thread's start allocates; `new` waits for it, so that later runs do not.
        let started = Arc::new(Barrier::new(threads));
        let workers = (1..threads)
            .map(|index| {
                let parked = Arc::new(AtomicBool::new(false));
                let (post, flag, started) = (post.clone(), parked.clone(), started.clone());
                let join = thread::Builder::new()
                    .name(format!("kernels-{index}"))
                    .spawn(move || {
                        started.wait();
                        post.serve(index, &flag);
                    })
                    .expect("the system starts a thread");
                Worker { parked, join: Some(join) }
            })
            .collect();
        started.wait();
        Team { post, workers }
    }

    /// Whether a task of the current run panicked: others must not wait for what it was to do.
    pub(crate) fn failed(&self) -> &AtomicBool {
        &self.post.failed
    }

    /// Workers, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task, worker)` once for every `task < tasks`, and returns when all are done.
    ///
    /// # Panics
    /// With the payload of the first task that panicked, after all running tasks ended.
    pub(crate) fn run(&self, tasks: usize, body: Body<'_>) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        let post = &*self.post;
        let count = u32::try_from(tasks).expect("tasks fit in 32 bits");
        let run = (post.ticket.0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        post.unfinished.0.store(count, Ordering::Relaxed);
        post.tasks.store(count, Ordering::Release);
        post.body.store((&raw const body).cast_mut().cast(), Ordering::Release);
        post.ticket.0.store(run << 32 | u64::from(count), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for worker in self.workers.iter().take(tasks - 1) {
            if worker.parked.load(Ordering::SeqCst) {
                worker.join.as_ref().expect("the team lives").thread().unpark();
            }
        }
        post.claim_all(0);
        post.wait_done();
        if post.failed.swap(false, Ordering::AcqRel) {
            let payload = post.panic.lock().expect("no code panics under this lock").take();
            resume_unwind(payload.expect("a failed task left its payload"));
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.post.stop.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for worker in &mut self.workers {
            let join = worker.join.take().expect("dropped once");
            join.thread().unpark();
            // Tasks' panics are caught, so a worker ends normally; nothing is left to report here.
            let _ = join.join();
        }
    }
}

impl Post {
    /// Claims and runs tasks until none is left, then says how many it did.
    fn claim_all(&self, worker: usize) {
        let mut done = 0;
        loop {
            let ticket = self.ticket.0.load(Ordering::Acquire);
            let left = ticket as u32;
            if left == 0 {
                break;
            }
            // Acquire: had a later run already written these, the exchange below would see that
            // run's ticket and fail.
            let tasks = self.tasks.load(Ordering::Acquire);
            let body = self.body.load(Ordering::Acquire).cast::<Body<'_>>();
            let claimed = self.ticket.0.compare_exchange(
                ticket,
                ticket - 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if claimed.is_err() {
                continue;
            }
            let task = (tasks - left) as usize;
            // SAFETY: the task just claimed is not yet said to be finished, so the caller still
            // waits in `run` and its `body` is alive.
            let body = unsafe { *body };

            if !self.failed.load(Ordering::Acquire)
                && let Err(payload) = catch_unwind(AssertUnwindSafe(|| body(task, worker)))
            {
                self.panic.lock().expect("no code panics under this lock").get_or_insert(payload);
                self.failed.store(true, Ordering::Release);
            }
            done += 1;
        }
        if done > 0 && self.unfinished.0.fetch_sub(done, Ordering::SeqCst) == done && worker != 0 {
            fence(Ordering::SeqCst);
            if self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = &*self.caller.lock().expect("no code panics under this lock")
            {
                caller.unpark();
            }
        }
    }

    /// The caller's wait for tasks that others still run.
    fn wait_done(&self) {
        for _ in 0..POLLS_MAX {
            if self.unfinished.0.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        *self.caller.lock().expect("no code panics under this lock") = Some(thread::current());
        self.caller_parked.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        while self.unfinished.0.load(Ordering::SeqCst) > 0 {
            thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }

    /// A spawned worker's life.
    fn serve(&self, worker: usize, parked: &AtomicBool) {
        let mut polls = 0;
        loop {
            if self.ticket.0.load(Ordering::Acquire) as u32 > 0 {
                self.claim_all(worker);
                polls = 0;
            } else if self.stop.load(Ordering::Acquire) {
                return;
            } else if polls < POLLS_MAX {
                polls += 1;
                std::hint::spin_loop();
            } else {
                parked.store(true, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                let idle = self.ticket.0.load(Ordering::SeqCst) as u32 == 0;
                if idle && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                parked.store(false, Ordering::SeqCst);
                polls = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    #[test]
    fn every_task_runs_exactly_once_in_each_of_many_runs() {
        let team = Team::new(3);
        let counts: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
        for run in 1..=2000 {
            let tasks = run % 50;
            team.run(tasks, &|task, _| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            for (task, count) in counts.iter().enumerate() {
                let want = usize::from(task < tasks);
                assert_eq!(count.swap(0, Ordering::Relaxed), want, "run {run}, task {task}");
            }
            if run % 500 == 0 {
                // Long enough for the workers to park.
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_next_run_is_whole() {
        let team = Team::new(2);
        for victim in 0..8 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(8, &|task, _| {
                    thread::sleep(Duration::from_micros(100));
                    assert_ne!(task, victim, "planted");
                });
            }));
            assert!(result.is_err(), "the panic of task {victim} is seen");
            let ran = AtomicUsize::new(0);
            team.run(8, &|_, _| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 8);
        }
    }

    #[test]
    fn the_caller_waits_for_a_slow_worker() {
        let team = Team::new(2);
        let done = AtomicUsize::new(0);
        team.run(2, &|_, worker| {
            // Both tasks are slow, so the caller cannot take both before the worker wakes.
            thread::sleep(Duration::from_millis(if worker == 0 { 5 } else { 30 }));
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 2);
    }
}
