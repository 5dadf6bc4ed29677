//! KV memory: P pages of L = 16 tokens for every layer, taken once. Knows no sequences; the page
//! book is the caller's.
//!
//! One head's page is K `[D, L]` (lanes over tokens, so a query's 16 scores come from D broadcast
//! multiplications) followed by V `[L/2, D/16, 2, 16]` (lanes over D, padded to 16, two tokens side
//! by side). Both lie in groups of 32 values (two d of 16 tokens; two tokens' 16 d) as
//! `simd::Element` stores them: in bf16 a word is what `vdpbf16ps` sums over. In int8 the scales
//! follow, in f32: `[L]` of K, `[L]` of V. Order: layer, page, head.

use half::bf16;

use crate::buffer::{Buffer, Shared};
use crate::device::{Device, Kind, Memory};
use crate::simd::LANES;
use crate::{Error, KvDtype};

/// See the module page.
pub struct KvCache {
    store: Store,
    layout: Layout,
}

enum Store {
    F32(Buffer<f32>),
    Bf16(Buffer<bf16>),
    Int8(Buffer<i8>),
}

/// Where things are, in values.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) layers: usize,
    pub(crate) pages: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Values that the scales of a head's page take the room of.
    scales: usize,
}

impl Layout {
    fn new(
        dtype: KvDtype,
        layers: usize,
        pages: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Layout {
        let scales = match dtype {
            KvDtype::F32 | KvDtype::Bf16 => 0,
            KvDtype::Int8 => 2 * KvCache::PAGE * size_of::<f32>(),
        };
        Layout { layers, pages, kv_heads, head_dim, scales }
    }

    /// D of V, padded.
    #[inline(always)]
    pub(crate) fn v_stride(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Where V of `token` and its neighbour have the group of d to d + 15 within a head's page.
    #[inline(always)]
    pub(crate) fn v_group(&self, token: usize, d: usize) -> usize {
        self.v_start() + (token / 2 * self.v_stride() + d) * 2
    }

    /// V's start within a head's page.
    #[inline(always)]
    fn v_start(&self) -> usize {
        self.head_dim * KvCache::PAGE
    }

    /// The scales' start within a head's page.
    #[inline(always)]
    pub(crate) fn scales_start(&self) -> usize {
        (self.head_dim + self.v_stride()) * KvCache::PAGE
    }

    /// Values of one head's page.
    fn head(&self) -> usize {
        self.scales_start() + self.scales
    }

    /// First value of one head's page.
    #[inline(always)]
    pub(crate) fn at(&self, layer: usize, page: usize, kv_head: usize) -> usize {
        ((layer * self.pages + page) * self.kv_heads + kv_head) * self.head()
    }
}

/// The values, of either type.
#[derive(Clone, Copy)]
pub(crate) enum Values {
    F32(Shared<f32>),
    Bf16(Shared<bf16>),
    Int8(Shared<i8>),
}

impl KvCache {
    /// L: tokens of a page.
    pub const PAGE: usize = LANES;

    /// Memory of `pages` pages for `layers` layers. The system finds it when it is written:
    /// [`KvCache::touched`].
    ///
    /// # Errors
    /// On a GPU.
    pub fn new(
        memory: &Memory,
        dtype: impl Into<KvDtype>,
        layers: usize,
        pages: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<KvCache, Error> {
        memory.only_cpu("a KV cache")?;
        let dtype = dtype.into();
        let layout = Layout::new(dtype, layers, pages, kv_heads, head_dim);
        let values = layers * pages * kv_heads * layout.head();
        let store = match dtype {
            KvDtype::F32 => Store::F32(Buffer::untouched(values)),
            KvDtype::Bf16 => Store::Bf16(Buffer::untouched(values)),
            KvDtype::Int8 => Store::Int8(Buffer::untouched(values)),
        };
        Ok(KvCache { store, layout })
    }

    /// The same with its memory taken, on all threads of the device: most of the time of a start
    /// that is not the model's goes into clearing it.
    pub fn touched(self, dev: &Device) -> KvCache {
        let Kind::Cpu(cpu) = &dev.kind else { return self };
        let store = match self.store {
            Store::F32(values) => Store::F32(values.touched(cpu)),
            Store::Bf16(values) => Store::Bf16(values.touched(cpu)),
            Store::Int8(values) => Store::Int8(values.touched(cpu)),
        };
        KvCache { store, layout: self.layout }
    }

    /// Bytes of one page through all layers.
    pub fn page_bytes(
        dtype: impl Into<KvDtype>,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> usize {
        let dtype = dtype.into();
        let value = match dtype {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
            KvDtype::Int8 => 1,
        };
        layers * kv_heads * Layout::new(dtype, layers, 1, kv_heads, head_dim).head() * value
    }

    /// P.
    pub fn pages(&self) -> usize {
        self.layout.pages
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::F32(values) => values.bytes(),
            Store::Bf16(values) => values.bytes(),
            Store::Int8(values) => values.bytes(),
        }
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    pub(crate) fn writer(&mut self) -> Values {
        match &mut self.store {
            Store::F32(values) => Values::F32(Shared::of(values)),
            Store::Bf16(values) => Values::Bf16(Shared::of(values)),
            Store::Int8(values) => Values::Int8(Shared::of(values)),
        }
    }

    /// For reading only.
    pub(crate) fn reader(&self) -> Values {
        match &self.store {
            Store::F32(values) => Values::F32(Shared::new(values.as_ptr().cast_mut())),
            Store::Bf16(values) => Values::Bf16(Shared::new(values.as_ptr().cast_mut())),
            Store::Int8(values) => Values::Int8(Shared::new(values.as_ptr().cast_mut())),
        }
    }
}

/// Whose rows these are: `positions` and `sequences` `[T]`; the pages of sequence `s` are
/// `pages[page_indptr[s]..page_indptr[s + 1]]`, in order of position.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pub positions: &'a [u32],
    pub sequences: &'a [u32],
    pub pages: &'a [u32],
    pub page_indptr: &'a [u32],
}

impl<'a> Rows<'a> {
    /// T.
    pub fn count(&self) -> usize {
        self.positions.len()
    }

    /// The pages of the sequence of row `t`.
    #[inline]
    pub(crate) fn pages_of(&self, t: usize) -> &'a [u32] {
        let s = self.sequences[t] as usize;
        &self.pages[self.page_indptr[s] as usize..self.page_indptr[s + 1] as usize]
    }

    /// # Panics
    /// Unless every row's position lies within its sequence's pages and every page within the
    /// cache.
    pub(crate) fn check(&self, layout: Layout) {
        assert_eq!(self.positions.len(), self.sequences.len(), "a position and a sequence a row");
        for t in 0..self.count() {
            let (pages, position) = (self.pages_of(t), self.positions[t] as usize);
            assert!(
                position < pages.len() * KvCache::PAGE,
                "row {t}: position {position} beyond its {} pages",
                pages.len()
            );
        }
        for &page in self.pages {
            assert!((page as usize) < layout.pages, "page {page} of {}", layout.pages);
        }
    }
}
