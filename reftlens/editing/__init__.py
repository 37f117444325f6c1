"""One edited forward pass: sites, the `ReFT` that holds interventions, and the engine that attaches them."""
