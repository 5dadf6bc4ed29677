//! Full and failing disks, lost catalogues, jumping clocks: what was answered as done is there.
