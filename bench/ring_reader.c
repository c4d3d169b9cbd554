// SPDX-License-Identifier: MIT
/*
 * The cheapest possible reader of a BPF ring buffer, as bench/reader.c is of a group of Netlink:
 * ring_reader FD BYTES waits as nlproto does, and throws away what it finds.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int fd = argc == 3 ? atoi(argv[1]) : -1, poll = epoll_create1(0);
	size_t size = argc == 3 ? strtoul(argv[2], NULL, 10) : 0, page = getpagesize();
	struct epoll_event event = { .events = EPOLLIN };
	volatile uint64_t *consumed, *produced;
	uint64_t records = 0;
	volatile uint8_t *data;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	consumed = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	produced = mmap(NULL, page + 2 * size, PROT_READ, MAP_SHARED, fd, page);
	if (consumed == MAP_FAILED || produced == MAP_FAILED ||
	    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event)) {
		perror("ring_reader");
		return 1;
	}
	data = (volatile uint8_t *)produced + page;
	for (;;) {
		uint64_t at = *consumed, end = __atomic_load_n(produced, __ATOMIC_ACQUIRE);

		while (at < end) {
			uint32_t head = __atomic_load_n((uint32_t *)(data + (at & (size - 1))),
							__ATOMIC_ACQUIRE);

			if (head & 1U << 31)	/* BPF_RINGBUF_BUSY_BIT */
				break;
			at += ((head & ~(1U << 30)) + 8 + 7) & ~7UL;
			records++;
		}
		if (at != *consumed) {
			__atomic_store_n(consumed, at, __ATOMIC_RELEASE);
			/* more of them are no reason to be woken; a while later some may wait */
			epoll_wait(poll, &event, 1, 20);
		} else {
			epoll_wait(poll, &event, 1, 1000);
		}
	}
}
