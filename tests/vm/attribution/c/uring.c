// SPDX-License-Identifier: MIT
/*
 * uring TRUTH inline|async|sqpoll|fixed PORT COUNT: sends COUNT datagrams to
 * 127.0.0.1:PORT through io_uring and reads each reply through it. async forces
 * io-wq workers, sqpoll a kernel thread that submits; fixed has a child use a socket that
 * only the ring still has. Raw system calls: io_uring(7).
 */
#include "truth.h"
#include <linux/io_uring.h>
#include <sys/mman.h>

static int ring;
static unsigned *sq_tail, *sq_mask, *sq_array, *sq_flags, *cq_head, *cq_tail, *cq_mask;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;
static int polled;

static void setup(void)
{
	struct io_uring_params p = { .flags = polled ? IORING_SETUP_SQPOLL : 0, .sq_thread_idle = 1000 };
	char *sq, *cq;

	ring = syscall(__NR_io_uring_setup, 8, &p);
	if (ring < 0) {
		tell(errno);	/* the stage says that this kernel cannot */
		_exit(0);
	}
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
	cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(*cqes), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
	sqes = mmap(NULL, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED)
		fail("mmap");
	sq_tail = (void *)(sq + p.sq_off.tail);
	sq_mask = (void *)(sq + p.sq_off.ring_mask);
	sq_array = (void *)(sq + p.sq_off.array);
	sq_flags = (void *)(sq + p.sq_off.flags);
	cq_head = (void *)(cq + p.cq_off.head);
	cq_tail = (void *)(cq + p.cq_off.tail);
	cq_mask = (void *)(cq + p.cq_off.ring_mask);
	cqes = (void *)(cq + p.cq_off.cqes);
}

static int operate(int op, int sock, void *data, int size, int flags)
{
	unsigned tail = *sq_tail, index = tail & *sq_mask, wake = 0;
	int result;

	memset(&sqes[index], 0, sizeof(*sqes));
	sqes[index].opcode = op;
	sqes[index].fd = sock;
	sqes[index].addr = (uintptr_t)data;
	sqes[index].len = size;
	sqes[index].flags = flags;
	sq_array[index] = index;
	__atomic_store_n(sq_tail, tail + 1, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (polled && (__atomic_load_n(sq_flags, __ATOMIC_ACQUIRE) & IORING_SQ_NEED_WAKEUP))
		wake = IORING_ENTER_SQ_WAKEUP;
	while (__atomic_load_n(cq_tail, __ATOMIC_ACQUIRE) == *cq_head) {
		if (syscall(__NR_io_uring_enter, ring, polled ? 0 : 1, 1,
			    IORING_ENTER_GETEVENTS | wake, NULL, 0) < 0 && errno != EINTR)
			fail("io_uring_enter");
	}
	result = cqes[*cq_head & *cq_mask].res;
	__atomic_store_n(cq_head, *cq_head + 1, __ATOMIC_RELEASE);
	return result;
}

int main(int argc, char **argv)
{
	struct sockaddr_in peer;
	int sock, count, flags;
	char data[64] = "ring";

	if (argc != 5)
		return 2;
	truth_open(argv);
	polled = !strcmp(argv[2], "sqpoll");
	flags = strcmp(argv[2], "async") ? 0 : IOSQE_ASYNC;
	peer = loopback(atoi(argv[3]));
	count = atoi(argv[4]);
	sock = bound(SOCK_DGRAM, 0);
	if (connect(sock, (void *)&peer, sizeof(peer)))
		fail("connect");
	setup();
	tell(0);
	if (!strcmp(argv[2], "fixed")) {
		int closed[2];

		if (syscall(__NR_io_uring_register, ring, IORING_REGISTER_FILES, &sock, 1) || pipe(closed))
			fail("register");
		if (fork()) {
			/* the last descriptor that is closed is the parent's */
			close(closed[1]);
			read(closed[0], data, 1);
			close(sock);
			wait(&flags);
			return flags != 0;
		}
		truth_claim(sock, (struct claim){ .proto = "udp", .out = count, .in = count, .exact = 1 });
		close(sock);
		close(closed[1]);
		usleep(100000);
		sock = 0;	/* index in the ring's own table */
		flags = IOSQE_FIXED_FILE;
	} else {
		truth_claim(sock, (struct claim){ .proto = "udp", .out = count, .in = count, .exact = 1 });
	}
	for (int i = 0; i < count; i++) {
		if (operate(IORING_OP_SEND, sock, data, 10, flags) != 10)
			fail("send");
		if (operate(IORING_OP_RECV, sock, data, sizeof(data), flags) != 10)
			fail("recv");
	}
	return 0;
}
