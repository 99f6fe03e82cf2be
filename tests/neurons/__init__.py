"""Tests of the neuron experiment, and what they share."""
