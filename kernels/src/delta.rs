//! What an adapter changes at one site: factors, gain, bias. Immutable.
//!
//! Owns the choice of the form: packed on the CPU ([`crate::linear`]), bf16 factors on a GPU. The
//! thing to know: the scale is folded into the factors here, once.

use crate::cuda;
use crate::device::{Memory, On};
use crate::linear::delta as cpu;
use crate::{Error, FactorDtype};

/// See the module page.
pub struct Delta {
    on: On<cpu::Delta, cuda::Delta>,
}

// The second form costs the first no cache line.
const _: () = assert!(size_of::<Option<Delta>>() == size_of::<cpu::Delta>());

impl Delta {
    /// `a` `[R, I]` and `b` `[O, R]`, row-major as in PEFT files. The scale multiplies B. `gain`
    /// `[O]` multiplies the sum of base and delta (DoRA); `bias` `[O]` is added after it, already
    /// scaled. Rank 0 is a gain or a bias alone.
    ///
    /// # Errors
    /// A GPU without room, or asked for other factors than bf16, for a gain or for a bias.
    ///
    /// # Panics
    /// On lengths that do not fit the shape.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one delta, named as in its formula"
    )]
    pub fn new(
        memory: &Memory,
        dtype: impl Into<FactorDtype>,
        rank: usize,
        inputs: usize,
        outputs: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
        gain: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Result<Delta, Error> {
        assert_eq!(a.len(), rank * inputs, "A is [{rank}, {inputs}]");
        assert_eq!(b.len(), outputs * rank, "B is [{outputs}, {rank}]");
        for values in [&gain, &bias].into_iter().flatten() {
            assert_eq!(values.len(), outputs, "gain and bias have {outputs} values");
        }
        let source = cpu::Source { rank, inputs, outputs, a, b, scale };
        let dtype = dtype.into();
        let on = match memory {
            Memory::Cpu => On::Cpu(cpu::Delta::new(dtype, source, gain, bias)),
            Memory::Cuda(memory) => {
                let lacks = |what| Err(Error::OnCpuOnly(what));
                match (dtype, gain, bias) {
                    (_, Some(_), _) => return lacks("an adapter's gain (DoRA)"),
                    (_, _, Some(_)) => return lacks("an adapter's bias"),
                    (FactorDtype::F32, ..) => return lacks("an adapter's factors in f32"),
                    (FactorDtype::Int8, ..) => return lacks("an adapter's factors in int8"),
                    (FactorDtype::Bf16, None, None) => {}
                }
                On::Cuda(Box::new(cuda::Delta::new(memory, rank, inputs, outputs, a, b, scale)?))
            }
        };
        Ok(Delta { on })
    }

    /// Whether it multiplies what it is added to.
    pub fn has_gain(&self) -> bool {
        match &self.on {
            On::Cpu(delta) => delta.has_gain(),
            On::Cuda(_) => false,
        }
    }

    /// R.
    pub fn rank(&self) -> usize {
        match &self.on {
            On::Cpu(delta) => delta.rank(),
            On::Cuda(delta) => delta.rank(),
        }
    }

    /// I.
    pub fn inputs(&self) -> usize {
        match &self.on {
            On::Cpu(delta) => delta.inputs(),
            On::Cuda(delta) => delta.inputs(),
        }
    }

    /// O.
    pub fn outputs(&self) -> usize {
        match &self.on {
            On::Cpu(delta) => delta.outputs(),
            On::Cuda(delta) => delta.outputs(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.on {
            On::Cpu(delta) => delta.bytes(),
            On::Cuda(delta) => delta.bytes(),
        }
    }

    pub(crate) fn on(&self) -> &On<cpu::Delta, cuda::Delta> {
        &self.on
    }
}
