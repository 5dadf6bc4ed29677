//! Layer 0 against PEFT's own merged tensors.

use crate::merge::sources::{Adapter, apart, merged, product};
use polylora::adapters::format::factors::{
    FactorDims, FactorSite, ModuleFactors, infer_shape, open,
};
use polylora::merge::spec::Method;
use polylora::shape::{Projection, Site};
use std::collections::BTreeMap;
use support::{golden_adapter, peft};

const TENSORS: &[u8] = include_bytes!("../../golden/merge_layer0.safetensors");

/// A merged tensor of the golden file: (rows, columns, values).
fn golden(name: &str) -> Option<(usize, usize, Vec<f32>)> {
    let file = safetensors::SafeTensors::deserialize(TENSORS).expect("golden tensors");
    let view = file.tensor(name).ok()?;
    let floats = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
    Some((view.shape()[0], view.shape()[1], floats.collect()))
}

fn golden_factors(case: &str, module: &str) -> Option<ModuleFactors> {
    let (rank, inputs, a) = golden(&format!("{case}.{module}.A"))?;
    let (outputs, _, b) = golden(&format!("{case}.{module}.B"))?;
    Some(ModuleFactors { dims: FactorDims { rank, inputs, outputs }, a, b, scale: 1.0 })
}

const MODULES: [(&str, Projection); 2] = [("q_proj", Projection::Q), ("v_proj", Projection::V)];

/// q and v of layer 0 of a sample adapter.
fn layer0(name: &str) -> Adapter {
    let dir = golden_adapter(name);
    let shape = infer_shape(&[&dir]).expect("a shape");
    let adapter = open(&dir, &shape).expect("an adapter");
    let places = MODULES.map(|(_, p)| FactorSite::Site(Site::Layer(0, p)));
    places.map(|p| (p, adapter.read(p).expect("values").expect("factors"))).into_iter().collect()
}

#[test]
fn every_deterministic_method_makes_what_peft_makes() {
    let golden = support::golden("merge.json");
    let mut compared = 0;
    for (case, result) in golden["results"].as_object().expect("results") {
        if result["kwargs"].is_null() {
            continue; // both adapters active: nothing was merged
        }
        let spec = peft::spec(&result["kwargs"]);
        let adapters: Vec<Adapter> = spec.sources.iter().map(|s| layer0(&s.name)).collect();
        let merged = merged(&spec, &adapters);
        for (module, p) in MODULES {
            let Some(expected) = golden_factors(case, module) else { continue };
            let ours = &merged.modules[&FactorSite::Site(Site::Layer(0, p))];
            assert_eq!(ours.dims, expected.dims, "{case}");
            let error = apart(&product(ours), &product(&expected));
            eprintln!("{case:20} {module} {error:.2e}");
            assert!(error < 1e-4, "{case} {module}: {error}");
            compared += 1;
        }
    }
    assert_eq!(compared, 12, "every case has a golden v_proj, three a q_proj");
}

/// The second adapter of this case is only known by what PEFT made of it.
#[test]
fn mixed_ranks_are_concatenated_and_truncated_as_peft_does() {
    let pirate = layer0("pirate");
    let place = FactorSite::Site(Site::Layer(0, Projection::V));
    let cat = golden_factors("cat_mixed_rank", "v_proj").expect("golden");
    let d = cat.dims;
    let second = ModuleFactors {
        dims: FactorDims { rank: d.rank - 8, ..d },
        a: cat.a[8 * d.inputs..].to_vec(),
        b: cat.b.chunks(d.rank).flat_map(|row| row[8..].to_vec()).collect(),
        scale: 1.0,
    };
    let adapters =
        [BTreeMap::from([(place, pirate[&place].clone())]), BTreeMap::from([(place, second)])];
    for (case, method) in [("cat_mixed_rank", Method::Cat), ("svd_mixed_rank", Method::Svd)] {
        let expected = golden_factors(case, "v_proj").expect("golden");
        let mut spec = crate::merge::sources::spec(method, &[0.7, 1.0]);
        spec.options.rank = method.takes_rank().then_some(d.rank);
        let ours = merged(&spec, &adapters);
        let error = apart(&product(&ours.modules[&place]), &product(&expected));
        assert!(error < 1e-4, "{case}: {error}");
    }
}
