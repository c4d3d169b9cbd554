// SPDX-License-Identifier: MIT
/*
 * ringhold TRUTH exit|close|unregister|update|exec|one_of_two COUNT: uses a UDP
 * socket that it has by an io_uring alone, then lets go of it that way. A child
 * has the only descriptor, and never uses it. Told are the port, then that the
 * socket is the child's (one_of_two: still its own), and each is answered.
 * Datagrams of 5 bytes come before that, of 6 after it.
 */
#include "truth.h"
#include <linux/io_uring.h>
#include <sys/mman.h>

struct ring {
	int fd;
	unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail;
	struct io_uring_sqe *sqes;
};

static int enter_with(int sock, int number, struct ring *ring)
{
	struct io_uring_params p = { 0 };
	char *sq, *cq;

	ring->fd = syscall(__NR_io_uring_setup, 8, &p);
	if (ring->fd < 0)
		return -errno;
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe),
		  PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_CQ_RING);
	ring->sqes = mmap(NULL, p.sq_entries * sizeof(*ring->sqes), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || ring->sqes == MAP_FAILED)
		fail("mmap");
	ring->sq_tail = (void *)(sq + p.sq_off.tail);
	ring->sq_mask = (void *)(sq + p.sq_off.ring_mask);
	ring->sq_array = (void *)(sq + p.sq_off.array);
	ring->cq_head = (void *)(cq + p.cq_off.head);
	ring->cq_tail = (void *)(cq + p.cq_off.tail);
	if (syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_FILES, &sock, number))
		fail("register");
	return 0;
}

/* Looks for a datagram, and takes none. */
static void use(struct ring *ring)
{
	static char data[8];
	unsigned tail = *ring->sq_tail, index = tail & *ring->sq_mask;

	memset(&ring->sqes[index], 0, sizeof(*ring->sqes));
	ring->sqes[index].opcode = IORING_OP_RECV;
	ring->sqes[index].flags = IOSQE_FIXED_FILE;
	ring->sqes[index].addr = (uintptr_t)data;
	ring->sqes[index].len = sizeof(data);
	ring->sqes[index].msg_flags = MSG_DONTWAIT;
	ring->sq_array[index] = index;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
		fail("io_uring_enter");
	__atomic_store_n(ring->cq_head, __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE),
			 __ATOMIC_RELEASE);
}

static void has_it(int sock, int count)
{
	truth_claim(sock, (struct claim){ .proto = "udp", .in = count, .exact = 1, .len = 34 });
	tell(0);
	hear();
}

static void child(int sock, struct ring *ring, int gone, int count)
{
	pid_t parent = getppid();
	char c = 0;

	close(ring->fd);
	/* its descriptors go before it has ended */
	switch (read(gone, &c, 1)) {
	case 0:
		while (getppid() == parent)
			usleep(1000);
		break;
	case 1:
		break;
	default:
		fail("pipe");
	}
	if (c != 's')
		has_it(sock, count);
	_exit(0);
}

int main(int argc, char **argv)
{
	struct sockaddr_in own;
	socklen_t size = sizeof(own);
	struct io_uring_files_update update;
	struct ring ring, other;
	int sock, copy, count, gone[2], nothing = -1, result;
	char number[16], *way;
	pid_t pid;

	if (argc != 4)
		return 2;
	way = argv[2];
	count = atoi(argv[3]);
	if (!strcmp(way, "executed")) {
		if (write(count, "g", 1) != 1 || wait(&result) < 0)
			fail("child");
		return result != 0;
	}
	truth_open(argv);
	sock = bound(SOCK_DGRAM, 0);
	if (getsockname(sock, (void *)&own, &size) || pipe(gone))
		fail("getsockname");
	result = enter_with(sock, 1, &ring);
	if (result) {
		tell(result);	/* the stage says that this kernel cannot */
		return 0;
	}
	pid = fork();
	if (pid < 0)
		fail("fork");
	if (!pid) {
		close(gone[1]);
		child(sock, &ring, gone[0], count);
	}
	if (!strcmp(way, "one_of_two") && enter_with(sock, 1, &other))
		fail("second ring");
	truth_claim(sock, (struct claim){ .proto = "udp", .in = count, .exact = 1, .len = 33 });
	if (!strcmp(way, "one_of_two"))
		truth_claim(sock, (struct claim){ .proto = "udp", .in = count, .exact = 1,
						  .len = 34 });
	close(sock);
	use(&ring);
	tell(ntohs(own.sin_port));
	hear();
	if (!strcmp(way, "exit"))
		return 0;
	if (!strcmp(way, "close")) {
		close(ring.fd);
	} else if (!strcmp(way, "unregister")) {
		if (syscall(__NR_io_uring_register, ring.fd, IORING_UNREGISTER_FILES, NULL, 0))
			fail("unregister");
	} else if (!strcmp(way, "update")) {
		update = (struct io_uring_files_update){ .fds = (uintptr_t)&nothing };
		if (syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_FILES_UPDATE,
			    &update, 1) != 1)
			fail("update");
		/* the ring lets go of it a second later */
		sleep(5);
	} else if (!strcmp(way, "exec")) {
		copy = dup(gone[1]);
		snprintf(number, sizeof(number), "%d", copy);
		execl("/proc/self/exe", argv[0], argv[1], "executed", number, NULL);
		fail("exec");
	} else if (!strcmp(way, "one_of_two")) {
		close(ring.fd);
		tell(0);
		hear();
		if (write(gone[1], "s", 1) != 1)
			fail("pipe");
		return 0;
	}
	if (write(gone[1], "g", 1) != 1 || waitpid(pid, &result, 0) != pid)
		fail("child");
	return result != 0;
}
