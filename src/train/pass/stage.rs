//! The ops of a pass in their order.
//!
//! Owns the program. Never runs it. The thing to know: the backward half ends with the lowest
//! adapted site, and a site's dx is made only if something below reads it.

use crate::shape::{ModelShape, Projection, Site};

/// The ops of a layer, in forward order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Norm,
    Qkv,
    Rope,
    Attention,
    O,
    MlpNorm,
    Up,
    Gate,
    Glu,
    Down,
}

impl Stage {
    const ALL: [Stage; 10] = [
        Self::Norm,
        Self::Qkv,
        Self::Rope,
        Self::Attention,
        Self::O,
        Self::MlpNorm,
        Self::Up,
        Self::Gate,
        Self::Glu,
        Self::Down,
    ];

    /// The sites of a stage.
    pub fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Self::O => &[Projection::O],
            Self::Up => &[Projection::Up],
            Self::Gate => &[Projection::Gate],
            Self::Down => &[Projection::Down],
            Self::Norm | Self::Rope | Self::Attention | Self::MlpNorm | Self::Glu => &[],
        }
    }
}

/// One op of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Embed,
    Forward(usize, Stage),
    LastNorm,
    /// Of a chunk of supervised rows: logits, loss and the gradient of both.
    Head,
    /// Of the same chunk; then the next one has its turn.
    HeadBackward,
    /// What the last layer made gets its gradient.
    LastNormBackward,
    Backward(usize, Stage),
}

/// The ops of a pass over a model whose sites are adapted or not.
pub(super) fn program(shape: &ModelShape, adapted: impl Fn(Site) -> bool) -> Vec<Op> {
    let stages = || (0..shape.layers).flat_map(|l| Stage::ALL.map(|stage| (l, stage)));
    let mut ops = vec![Op::Embed];
    ops.extend(stages().map(|(layer, stage)| Op::Forward(layer, stage)));
    ops.extend([Op::LastNorm, Op::Head, Op::HeadBackward, Op::LastNormBackward]);
    ops.extend(stages().rev().map(|(layer, stage)| Op::Backward(layer, stage)));
    let trains = |op: &Op| match op {
        Op::Backward(layer, stage) => {
            stage.projections().iter().any(|p| adapted(Site::Layer(*layer, *p)))
        }
        _ => false,
    };
    let head = head(&ops);
    let last = ops.iter().rposition(trains).unwrap_or(head);
    ops.truncate(last + 1);
    ops
}

/// Where the head is.
pub(super) fn head(program: &[Op]) -> usize {
    program.iter().position(|op| *op == Op::Head).expect("there is a head")
}
