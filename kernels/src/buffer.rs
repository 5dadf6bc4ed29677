//! Memory of the ops: zeroed, 64-byte aligned, of fixed length. Never grows, never moves.
//!
//! 64 bytes is a cache line and one 16-lane f32 register, so a packed panel never straddles a line.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;

use half::bf16;

use crate::arena;
use crate::device::Cpu;

/// Types for which all-zero bytes are a value.
pub(crate) trait Zeroed: Copy {}
impl Zeroed for f32 {}
impl Zeroed for u32 {}
impl Zeroed for i32 {}
impl Zeroed for bf16 {}
impl Zeroed for i8 {}
impl Zeroed for u8 {}

/// A zeroed aligned slice on the heap.
pub(crate) struct Buffer<T: Zeroed> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its elements as a `Box<[T]>` does, and `T` is plain data.
unsafe impl<T: Zeroed + Send> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Zeroed + Sync> Sync for Buffer<T> {}

impl<T: Zeroed> Buffer<T> {
    /// A buffer of `len` zeros, in memory that is there.
    pub(crate) fn zeroed(len: usize) -> Buffer<T> {
        Self::taken(len, arena::take)
    }

    /// A buffer of `len` zeros. The system may find memory for them only when they are written:
    /// for what is filled at once, best by the threads that fill it.
    pub(crate) fn untouched(len: usize) -> Buffer<T> {
        Self::taken(len, arena::take_untouched)
    }

    fn taken(len: usize, take: fn(usize) -> NonNull<u8>) -> Buffer<T> {
        if len == 0 {
            return Buffer { start: NonNull::dangling(), len };
        }
        let bytes = len.checked_mul(size_of::<T>()).expect("buffer fits the address space");
        Buffer { start: take(bytes).cast(), len }
    }

    /// Writes its zeros, so that its memory is there, on all threads.
    pub(crate) fn touched(mut self, cpu: &Cpu) -> Buffer<T>
    where
        T: Send,
    {
        const PIECE_BYTES: usize = 4 << 20;
        let pieces: Vec<_> =
            self.chunks_mut(PIECE_BYTES / size_of::<T>()).map(Mutex::new).collect();
        cpu.fork_tasks(pieces.len(), &|piece, _| {
            let mut piece = pieces[piece].lock().expect("no code panics under this lock");
            // SAFETY: zeros are values of `T`, and this is within the borrowed slice.
            unsafe { piece.as_mut_ptr().write_bytes(0, piece.len()) };
        });
        drop(pieces);
        self
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Zeroed> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` holds `len` initialised elements for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Zeroed> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Zeroed> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: taken in `taken` for as many bytes.
            unsafe { arena::give_back(self.start.cast(), self.bytes()) }
        }
    }
}

/// A pointer that the tasks of one fork share. Whoever writes through it answers for disjointness.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}
// SAFETY: only a number; every dereference is an unsafe act of its user, who states why it is
// disjoint.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn of(slice: &mut [T]) -> Shared<T> {
        Shared(slice.as_mut_ptr())
    }

    pub(crate) fn new(p: *mut T) -> Shared<T> {
        Shared(p)
    }

    pub(crate) fn null() -> Shared<T> {
        Shared(std::ptr::null_mut())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}
