"""Side-by-side timings, one command each; equal numbers are asserted before anything is timed."""
