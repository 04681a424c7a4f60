"""What Shoal costs and reaches, measured. METHODOLOGY.md says how, and lists the scripts."""
