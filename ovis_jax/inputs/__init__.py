"""Host side: images and text become arrays, with numpy and Pillow only."""
