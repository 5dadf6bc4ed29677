//! Adafactor (Shazeer and Stern, arXiv 1804.04235) as transformers has it with a rate that is
//! given: `scale_parameter` and `relative_step` off, no first moment, decay −0.8, threshold 1.
//!
//! Owns the formula. Never keeps a moment. The thing to know: of a factor the moment is the means
//! of its rows, then of its columns; B lies here the other way round than in PEFT, which changes
//! nothing, since rows and columns are treated alike.

use super::update::Update;

/// Of updates, in how fast old gradients are forgotten.
const DECAY: f64 = -0.8;
/// Added to squares.
const EPS: f64 = 1e-30;
/// The root mean square of an update beyond which it is scaled down.
const THRESHOLD: f64 = 1.0;

/// Numbers of the moment of a tensor.
pub(super) fn moment_len([rows, columns]: [usize; 2]) -> usize {
    // Of one row, every value: what transformers keeps of vectors, and as good for a factor.
    if rows == 1 { columns } else { rows + columns }
}

/// One update of a tensor whose moment is this.
pub(super) fn apply(update: Update<'_>, moment: &mut [f32]) {
    let Update { values, gradients, dims, lr, shrink, clip, number, .. } = update;
    let keep = 1.0 - f64::from(number).powf(DECAY);
    let clip = f64::from(clip);
    let square = |g: &f32| (f64::from(*g) * clip).powi(2) + EPS;
    let mix = |old: &mut f32, new: f64| {
        *old = (keep * f64::from(*old) + (1.0 - keep) * new) as f32;
    };
    let [rows, columns] = dims;
    // What a gradient is multiplied by: a number of its row times one of its column.
    let (of_rows, of_columns) = moment.split_at_mut(if rows == 1 { 0 } else { rows });
    if rows == 1 {
        of_columns.iter_mut().zip(gradients).for_each(|(old, g)| mix(old, square(g)));
    } else {
        for (old, row) in of_rows.iter_mut().zip(gradients.chunks(columns)) {
            mix(old, row.iter().map(square).sum::<f64>() / columns as f64);
        }
        for (column, old) in of_columns.iter_mut().enumerate() {
            let all = gradients[column..].iter().step_by(columns);
            mix(old, all.map(square).sum::<f64>() / rows as f64);
        }
    }
    let sum: f64 = of_rows.iter().map(|x| f64::from(*x)).sum();
    let mean = if rows == 1 { 1.0 } else { sum / rows as f64 };
    let row_factor = |row: usize| match of_rows.get(row) {
        Some(of_row) => (f64::from(*of_row) / mean).sqrt().recip() * clip,
        None => clip,
    };
    let factor = |row: f64, column: usize| row / f64::from(of_columns[column]).sqrt();
    let mut squares = 0.0;
    for (row, gradients) in gradients.chunks(columns).enumerate() {
        let of_row = row_factor(row);
        let update = |(column, g): (usize, &f32)| f64::from(*g) * factor(of_row, column);
        squares += gradients.iter().enumerate().map(|x| update(x).powi(2)).sum::<f64>();
    }
    let rms = (squares / gradients.len() as f64).sqrt();
    let lr = lr / (rms / THRESHOLD).max(1.0);
    let lines = values.chunks_mut(columns).zip(gradients.chunks(columns));
    for (row, (values, gradients)) in lines.enumerate() {
        let of_row = row_factor(row) * lr;
        for (column, (value, g)) in values.iter_mut().zip(gradients).enumerate() {
            *value = *value * shrink - (f64::from(*g) * factor(of_row, column)) as f32;
        }
    }
}
