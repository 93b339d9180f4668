"""Studies: many training runs that differ in named settings, measured alike and compared in pairs."""
