"""The tests of moelab."""
